"""The report on a lowered model: what one rank holds and sends in one optimizer step, as plain data and as tables."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from shardcomp.cost.communication import local_numel, messages
from shardcomp.errors import PlanError
from shardcomp.runtime.blueprint import MASTER

if TYPE_CHECKING:
    from shardcomp.lowering import Lowered

WIDTH = 100
"""Columns of a rendered report, whatever the terminal: it is compared and pasted."""


def report(lowered: Lowered, rank: int = 0) -> dict[str, Any]:
    """What `rank` holds and sends in one optimizer step of `lowered`; sizes in bytes. Raises PlanError for a rank there is not.

    memory: what is held between steps: the parameters that the optimizer updates, their gradients, and two moments of each, all
    in the dtype of the masters. The copy that a forward computes with lives no longer than its backward and is not in it.
    """
    program, mesh, options = lowered.program, lowered.mesh, lowered.policy.options
    if not 0 <= rank < mesh.world_size:
        raise PlanError(f"rank {rank}: the world has the ranks 0 to {mesh.world_size - 1}")
    coordinates = mesh.coordinates(rank)
    master = MASTER[options.precision]
    held = {name: local_numel(program, name, coordinates) * master.itemsize for name in program.parameters}
    trained = sum(size for name, size in held.items() if program.parameters[name].requires_grad)
    micro_batches = lowered.global_batch // (mesh.dp * lowered.micro_batch)
    sent = messages(program, master, lowered.micro_batch, lowered.seq, micro_batches, coordinates)
    return {
        "model": {
            "name": program.name,
            "parameters": sum(math.prod(parameter.shape) for parameter in program.parameters.values()),
            "layers": sum(unit.kind == "layer" for unit in program.units),
        },
        "mesh": mesh.as_dict(),
        "policy": lowered.policy.replace(data=mesh.dp, micro_batch=lowered.micro_batch).as_dict(),
        "step": {"seq": lowered.seq, "micro_batch": lowered.micro_batch, "global_batch": lowered.global_batch},
        "collectives": [asdict(message) for message in sent],
        "replicated": _replicated(lowered),
        "memory": {"parameters": sum(held.values()), "gradients": trained, "optimizer": 2 * trained},
        "degraded": [asdict(degraded) for degraded in program.degraded],
    }


def _replicated(lowered: Lowered) -> list[dict[str, Any]]:
    """The parameters of which a tensor-parallel rank holds more than its share, alike ones together: what, how many elements in
    all, and why."""
    program, size = lowered.program, lowered.mesh.tp
    entries = lowered.policy.weight_entries(program.parameters, program.canonical_names())
    grouped: dict[tuple[str, str], int] = {}
    for parameter in program.parameters.values() if size > 1 else ():
        placement = parameter.layout.on("tp")
        if placement.is_split and placement.copies == 1:
            continue
        pieces = size // placement.copies if placement.is_split else 1
        word = entries.get(parameter.name)
        if word is None or word == "whole":
            why = "no entry of [weights] splits it"
        elif word == "rowwise":
            why = "rowwise splits what its module contracts, and this is added once, behind the sum"
        else:
            why = f"it makes {pieces} {'head' if pieces == 1 else 'heads'}: each is held by {size // pieces} ranks"
        what = ".".join("*" if part.isdigit() else part for part in parameter.name.split("."))
        grouped[what, why] = grouped.get((what, why), 0) + math.prod(parameter.shape)
    return [{"what": what, "parameters": elements, "why": why} for (what, why), elements in grouped.items()]


def render(found: dict[str, Any]) -> str:
    """A report as text: the plan, memory, and messages added up over the units."""
    model, step, options = found["model"], found["step"], found["policy"]["options"]
    lines = [
        f"{model['name']}: {model['parameters']:,} parameters, {model['layers']} layers",
        "mesh      " + " · ".join(f"{axis} {size}" for axis, size in found["mesh"].items()),
        f"policy    {found['policy']['source']}: " + ", ".join(f"{key} = {_word(held)}" for key, held in options.items()),
        f"step      {step['global_batch']} samples of {step['seq']} tokens, {step['micro_batch']} in a micro-batch of a rank",
        *_shares(found),
        *(f"degraded  {entry['what']}: {entry['why']}" for entry in found["degraded"]),
    ]
    memory = _table("a rank holds between steps", "bytes")
    for name, size in found["memory"].items():
        memory.add_row(name, size_text(size))
    memory.add_section()
    memory.add_row("total", size_text(sum(found["memory"].values())))
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None)
    for table in (memory, _traffic(found["collectives"])):
        console.print(table)
    return "\n".join([*lines, *(line.rstrip() for line in text.getvalue().splitlines())]) + "\n"


def _shares(found: dict[str, Any]) -> Iterable[str]:
    """How much of the model the tensor-parallel ranks share, and what they do not."""
    if found["mesh"]["tp"] > 1:
        held = sum(entry["parameters"] for entry in found["replicated"])
        yield f"split     {1 - held / found['model']['parameters']:.1%} of the parameters"
        yield from (f"copied    {e['what']} ({e['parameters']:,}): {e['why']}" for e in found["replicated"])


def _traffic(collectives: Iterable[dict[str, Any]]) -> Table:
    """One line per operation, axis and phase, with the number of messages and the bytes that the rank passes in."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for entry in collectives:
        total = totals.setdefault((entry["phase"], entry["axis"], entry["op"]), [0, 0])
        total[0] += entry["count"]
        total[1] += entry["bytes"]
    table = _table("a rank sends in a step", "axis", "phase", "count", "bytes")
    order = ("forward", "backward", "step")
    for (phase, axis, op), (count, size) in sorted(totals.items(), key=lambda entry: (order.index(entry[0][0]), entry[0][1:])):
        table.add_row(op, axis, phase, f"{count:,}", size_text(size))
    table.add_section()
    counts, sizes = (sum(total[i] for total in totals.values()) for i in (0, 1))
    table.add_row("total", "", "", f"{counts:,}", size_text(sizes))
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE, header_style="", min_width=44)
    for column in (first, *columns):
        table.add_column(column, justify="right" if column in ("count", "bytes") else "left", no_wrap=True)
    return table


def _word(held: Any) -> str:
    return str(held).lower() if isinstance(held, bool) else str(held)


def size_text(size: int) -> str:
    """Bytes with a decimal unit and three digits: 1.23 MB."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            scaled = size / 10**power
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{size} B"
