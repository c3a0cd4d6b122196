"""The report on a lowered model: what one rank holds and sends in one optimizer step, as plain data and as tables."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sympy
from rich import box
from rich.console import Console
from rich.table import Table

from shardcomp.cost.activations import unit_activations
from shardcomp.cost.communication import held_by, messages, stages_of
from shardcomp.cost.flops import Share, of_units
from shardcomp.cost.memory import Held, held_in, local_numel
from shardcomp.errors import PlanError
from shardcomp.ir.program import B, Program, S
from shardcomp.kernels.counts import kernel_counts

if TYPE_CHECKING:
    from shardcomp.lowering import Lowered

_NUMBERS = ("count", "bytes", "parameters", "flops")
WIDTH = 100
"""Columns of a rendered report, whatever the terminal: it is compared and pasted."""


def report(lowered: Lowered, rank: int = 0) -> dict[str, Any]:
    """What `rank` holds, computes and sends in one optimizer step of `lowered`; sizes in bytes. Raises PlanError for a rank
    there is not.

    stages, units, memory, split, replicated, collectives and flops are about the stages that this rank runs.
    units: what was decided for each, and `saved`, the bytes that one micro-batch leaves in it until its backward; inputs that
    carry no gradient, which many units share, are not among them.
    flops: those of products and attention, forward and backward. model: this rank's part of what the captured model asks;
    hardware: what it runs, with what is computed on several ranks or computed again. split: the part of the parameters that
    tensor-parallel ranks share.
    kernels: how many calls of each fused kernel these stages have, and in which modules; missed: where in the model one might
    have been meant, and why it was not put there.
    memory: what is held between two micro-batches: the parameters that the optimizer updates, with the copy that a forward
    computes with where it stays, their gradients, and two moments of each; in `host` what the host holds instead of the device.
    """
    program, mesh, options = lowered.program, lowered.mesh, lowered.policy.options
    if not 0 <= rank < mesh.world_size:
        raise PlanError(f"rank {rank}: the world has the ranks 0 to {mesh.world_size - 1}")
    coordinates = mesh.coordinates(rank)
    stages = stages_of(program, options.schedule, coordinates)
    held = held_by(program, stages)
    micro_batches = lowered.global_batch // (mesh.dp * lowered.micro_batch)
    sent = messages(program, options, lowered.micro_batch, lowered.seq, micro_batches, coordinates)
    replicated = _replicated(lowered, held)
    return {
        "model": {
            "name": program.name,
            "parameters": _numel(program, program.parameters),
            "layers": sum(unit.kind == "layer" for unit in program.units),
        },
        "mesh": mesh.as_dict(),
        "policy": lowered.policy.replace(data=mesh.dp, micro_batch=lowered.micro_batch).as_dict(),
        "step": {"seq": lowered.seq, "micro_batch": lowered.micro_batch, "global_batch": lowered.global_batch},
        "collectives": [asdict(message) for message in sent],
        "split": 1 - sum(entry["parameters"] for entry in replicated) / _numel(program, held),
        "replicated": replicated,
        "stages": [_stage(lowered, stage, coordinates, micro_batches) for stage in stages],
        "units": _units(lowered, stages, coordinates),
        "flops": _flops(lowered, stages, coordinates, micro_batches),
        "memory": asdict(sum((held_in(program, stage, options, coordinates) for stage in stages), Held())),
        "kernels": kernel_counts(program.in_stages(stages)),
        "missed": [asdict(missed) for missed in program.missed],
        "degraded": [asdict(degraded) for degraded in program.degraded],
    }


def _numel(program: Program, names: Iterable[str]) -> int:
    return sum(math.prod(program.parameters[name].shape) for name in names)


def _stage(lowered: Lowered, stage: int, rank: dict[str, int], micro_batches: int) -> dict[str, Any]:
    """What a rank holds and computes for one of its stages."""
    program = lowered.program
    memory = held_in(program, stage, lowered.policy.options, rank)
    return {
        "units": [unit.path for unit in program.in_stages((stage,))],
        "parameters": sum(local_numel(program, name, rank) for name in held_by(program, (stage,))),
        "flops": _flops(lowered, (stage,), rank, micro_batches)["hardware"],
        "memory": memory.parameters + memory.gradients + memory.optimizer,
    }


def _units(lowered: Lowered, stages: Iterable[int], rank: dict[str, int]) -> list[dict[str, Any]]:
    """What was decided for each unit of these stages, and the bytes that one micro-batch leaves in it until its backward."""
    program = lowered.program
    return [
        {
            "path": unit.path,
            **asdict(unit.plan),
            "saved": unit_activations(program, unit, lowered.micro_batch, lowered.seq, rank).bytes,
        }
        for unit in program.in_stages(stages)
    ]


def _flops(lowered: Lowered, stages: Iterable[int], rank: dict[str, int], micro_batches: int) -> dict[str, Any]:
    """The operations of a step in these stages, see `report`."""
    program, sizes = lowered.program, {B: lowered.micro_batch, S: lowered.seq}
    units = program.in_stages(stages)
    share = Share(program.mesh.as_dict(), rank)
    again = sum(unit_activations(program, unit, lowered.micro_batch, lowered.seq, rank).products for unit in units)
    asked, run = of_units(units).total.products, of_units(units, share).total.products + again
    model, hardware = (micro_batches * int(sympy.sympify(count).subs(sizes)) for count in (asked, run))
    return {"model": model // program.mesh.tp, "hardware": hardware, "convention": "full_attention"}


def _replicated(lowered: Lowered, held: Iterable[str]) -> list[dict[str, Any]]:
    """Those of the parameters `held` of which a tensor-parallel rank holds more than its share, alike ones together: what, how
    many elements in all, and why."""
    program, size = lowered.program, lowered.mesh.tp
    entries = lowered.policy.weight_entries(program.parameters, program.canonical_names())
    grouped: dict[tuple[str, str], int] = {}
    for parameter in (program.parameters[name] for name in held if size > 1):
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
    model, step, flops, options = found["model"], found["step"], found["flops"], found["policy"]["options"]
    lines = [
        f"{model['name']}: {model['parameters']:,} parameters, {model['layers']} layers",
        "mesh      " + " · ".join(f"{axis} {size}" for axis, size in found["mesh"].items()),
        f"policy    {found['policy']['source']}: " + ", ".join(f"{key} = {_word(held)}" for key, held in options.items()),
        f"step      {step['global_batch']} samples of {step['seq']} tokens, {step['micro_batch']} in a micro-batch of a rank",
        *_shares(found),
        f"flops     {scaled(flops['model'])} of the model in a rank's step, {scaled(flops['hardware'])} run",
        "kernels   " + ", ".join(f"{entry['count']} {name}" for name, entry in found["kernels"].items()),
        *(f"missed    {entry['where']}: {entry['reason']}" for entry in found["missed"]),
        *(f"degraded  {entry['what']}: {entry['why']}" for entry in found["degraded"]),
    ]
    memory = _table("a rank holds between micro-batches", "bytes")
    host, *others = (found["memory"][name] for name in ("host", "parameters", "gradients", "optimizer"))
    for name, size in zip(("parameters", "gradients", "optimizer"), others, strict=True):
        memory.add_row(name, size_text(size))
    memory.add_section()
    memory.add_row("total", size_text(sum(others)))
    if host:
        memory.add_row("on the host", size_text(host))
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None)
    stages = [_stages(found["stages"])] if found["mesh"]["pp"] > 1 else []
    for table in (*stages, memory, _traffic(found["collectives"])):
        console.print(table)
    return "\n".join([*lines, *(line.rstrip() for line in text.getvalue().splitlines())]) + "\n"


def _shares(found: dict[str, Any]) -> Iterable[str]:
    """How much of the model the tensor-parallel ranks share, and what they do not."""
    if found["mesh"]["tp"] > 1:
        yield f"split     {found['split']:.1%} of the parameters"
        yield from (f"copied    {e['what']} ({e['parameters']:,}): {e['why']}" for e in found["replicated"])


def _stages(stages: Iterable[dict[str, Any]]) -> Table:
    """One line per stage of the rank."""
    table = _table("a rank runs", "parameters", "flops", "bytes")
    for stage in stages:
        first, last = stage["units"][0], stage["units"][-1]
        units = first if first == last else f"{first} … {last}"
        table.add_row(units, f"{stage['parameters']:,}", scaled(stage["flops"]), size_text(stage["memory"]))
    return table


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
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    return table


def _word(held: Any) -> str:
    return str(held).lower() if isinstance(held, bool) else str(held)


def size_text(size: int) -> str:
    """Bytes with a decimal unit and three digits: 1.23 MB."""
    return scaled(size) + "B" if size >= 1000 else f"{size} B"


def scaled(number: int) -> str:
    """A number with three digits and a decimal prefix: 1.23 M."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            short = number / 10**power
            return f"{short:.{2 if short < 10 else 1 if short < 100 else 0}f} {prefix}"
    return str(number)
