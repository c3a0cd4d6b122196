"""The report on a lowered model: what one rank stores, computes and sends in one optimizer step, as plain data and as text.

The classes say which keys `shardcomp inspect --json` prints. Sizes are in bytes, for one rank and one optimizer step.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypedDict

import sympy
from rich import box
from rich.console import Console
from rich.table import Table

from shardcomp.cost.activations import unit_activations
from shardcomp.cost.communication import Message, held_by, messages, stages_of
from shardcomp.cost.flops import Share, of_units
from shardcomp.cost.memory import StoredBytes, local_numel, stored_bytes
from shardcomp.errors import PlanError
from shardcomp.ir.program import B, Program, S
from shardcomp.kernels.counts import kernel_counts

if TYPE_CHECKING:
    from shardcomp.lowered import Lowered

_NO_ENTRY = "no entry of [weights] splits it"
_NORM = re.compile(r"(norm|(^|\.)ln)[^.]*\.[^.]+$")
"""The name of a parameter of a norm: replicated in every plan, which is nothing to act on."""
_NUMBERS = ("count", "bytes", "parameters", "flops")
WIDTH = 100
"""Columns of a rendered report, whatever the terminal: it is compared and pasted."""


class ModelEntry(TypedDict):
    """The whole model."""

    name: str
    parameters: int
    """How many elements they have."""
    layers: int


class StepEntry(TypedDict):
    """The optimizer step that is reported. The batches are counts of samples."""

    seq: int
    micro_batch: int
    global_batch: int


class CollectiveEntry(TypedDict):
    """Messages of one kind that this rank takes part in."""

    op: str
    """all_gather, reduce_scatter, all_reduce, all_to_all or send"""
    axis: str
    phase: str
    """forward, backward or step"""
    count: int
    bytes: int
    """`count` times the tensor that this rank passes in."""
    where: str
    """The path of a unit."""


class ReplicatedEntry(TypedDict):
    """Parameters of which a tensor-parallel rank has more than its share."""

    what: str
    """Their names, with `*` for the number of a layer."""
    weights: int
    """How many they are."""
    parameters: int
    """How many elements they have, all together."""
    why: str


class StageEntry(TypedDict):
    """One stage of this rank."""

    units: list[str]
    parameters: int
    """Elements that this rank has."""
    flops: int
    """Of products and attention, as this rank runs them."""
    memory: int
    """Parameters, gradients and optimizer states between micro-batches."""


class FlopsEntry(TypedDict):
    """Operations of products and attention, forward and backward."""

    model: int
    """This rank's share of what the captured model needs."""
    hardware: int
    """What this rank runs, with what several ranks compute and what is recomputed."""
    convention: str


class MissedEntry(TypedDict):
    """Where a kernel may have been meant, and why it is not used there."""

    where: str
    reason: str


class DegradedEntry(TypedDict):
    """What is right but slower than it could be."""

    what: str
    why: str


class Report(TypedDict):
    """What `report` returns, and what `shardcomp inspect --json` prints."""

    model: ModelEntry
    mesh: dict[str, int]
    """Axis -> its size."""
    policy: dict[str, Any]
    """As `Policy.as_dict` has it, with every option resolved."""
    step: StepEntry
    collectives: list[CollectiveEntry]
    split: float
    """The share of this rank's parameters that tensor parallelism splits."""
    replicated: list[ReplicatedEntry]
    stages: list[StageEntry]
    units: list[dict[str, Any]]
    """What was decided for each unit: its path, and the fields of its plan. `saved`: the bytes that a micro-batch leaves in the
    unit until its backward. Inputs without a gradient, which many units share, do not count."""
    flops: FlopsEntry
    memory: dict[str, int]
    """Between micro-batches. parameters: those that the optimizer updates, and the copy that a forward computes with if that
    stays. gradients: theirs. optimizer: two moments of each. host: what is in the host's memory instead of the device's."""
    kernels: dict[str, Any]
    """Kernel -> how many calls of it the stages have (`count`), and in which modules (`where`)."""
    missed: list[MissedEntry]
    degraded: list[DegradedEntry]


def report(lowered: Lowered, rank: int = 0) -> Report:
    """What `rank` stores, computes and sends in one optimizer step.

    model, mesh, policy, step, missed and degraded are about the whole plan. The other keys are about the stages of this rank.

    Raises:
        PlanError: the world has no such rank.

    Example:
        >>> import shardcomp
        >>> lowered = shardcomp.lower("tiny", shardcomp.Policy.load("llama", tensor=2), seq=64)
        >>> entry = lowered.report()
        >>> entry["mesh"], entry["collectives"][0]["op"]
        ({'pp': 1, 'dp': 1, 'cp': 1, 'tp': 2}, 'reduce_scatter')
    """
    program, mesh, options = lowered.program, lowered.mesh, lowered.policy.options
    if not 0 <= rank < mesh.world_size:
        raise PlanError(f"rank {rank}: the world has the ranks 0 to {mesh.world_size - 1}")
    coordinates = mesh.coordinates(rank)
    stages = stages_of(program, options.schedule, coordinates)
    names = held_by(program, stages)
    micro_batches = lowered.global_batch // (mesh.dp * lowered.micro_batch)
    sent = messages(program, options, lowered.micro_batch, lowered.seq, micro_batches, coordinates)
    replicated = _replicated(lowered, names)
    return {
        "model": {
            "name": program.name,
            "parameters": _numel(program, program.parameters),
            "layers": sum(unit.kind == "layer" for unit in program.units),
        },
        "mesh": mesh.as_dict(),
        "policy": lowered.policy.replace(data=mesh.dp, micro_batch=lowered.micro_batch).as_dict(),
        "step": {"seq": lowered.seq, "micro_batch": lowered.micro_batch, "global_batch": lowered.global_batch},
        "collectives": [_collective(message) for message in sent],
        "split": 1 - sum(entry["parameters"] for entry in replicated) / _numel(program, names),
        "replicated": replicated,
        "stages": [_stage(lowered, stage, coordinates, micro_batches) for stage in stages],
        "units": _units(lowered, stages, coordinates),
        "flops": _flops(lowered, stages, coordinates, micro_batches),
        "memory": asdict(sum((stored_bytes(program, stage, options, coordinates) for stage in stages), StoredBytes())),
        "kernels": kernel_counts(program.in_stages(stages)),
        "missed": [{"where": missed.where, "reason": missed.reason} for missed in program.missed],
        "degraded": [{"what": degraded.what, "why": degraded.why} for degraded in program.degraded],
    }


def _numel(program: Program, names: Iterable[str]) -> int:
    return sum(math.prod(program.parameters[name].shape) for name in names)


def _collective(message: Message) -> CollectiveEntry:
    return {
        "op": message.op,
        "axis": message.axis,
        "phase": message.phase,
        "count": message.count,
        "bytes": message.bytes,
        "where": message.where,
    }


def _stage(lowered: Lowered, stage: int, rank: dict[str, int], micro_batches: int) -> StageEntry:
    """What a rank stores and computes for one of its stages."""
    program = lowered.program
    memory = stored_bytes(program, stage, lowered.policy.options, rank)
    return {
        "units": [unit.path for unit in program.in_stages((stage,))],
        "parameters": sum(local_numel(program, name, rank) for name in held_by(program, (stage,))),
        "flops": _flops(lowered, (stage,), rank, micro_batches)["hardware"],
        "memory": memory.parameters + memory.gradients + memory.optimizer,
    }


def _units(lowered: Lowered, stages: Iterable[int], rank: dict[str, int]) -> list[dict[str, Any]]:
    program = lowered.program
    return [
        {
            "path": unit.path,
            **asdict(unit.plan),
            "saved": unit_activations(program, unit, lowered.micro_batch, lowered.seq, rank).bytes,
        }
        for unit in program.in_stages(stages)
    ]


def _flops(lowered: Lowered, stages: Iterable[int], rank: dict[str, int], micro_batches: int) -> FlopsEntry:
    program, sizes = lowered.program, {B: lowered.micro_batch, S: lowered.seq}
    units = program.in_stages(stages)
    share = Share(program.mesh.as_dict(), rank)
    recomputed = sum(unit_activations(program, unit, lowered.micro_batch, lowered.seq, rank).products for unit in units)
    captured, run = of_units(units).total.products, of_units(units, share).total.products + recomputed
    model, hardware = (micro_batches * int(sympy.sympify(count).subs(sizes)) for count in (captured, run))
    return {"model": model // program.mesh.tp, "hardware": hardware, "convention": "full_attention"}


def _replicated(lowered: Lowered, names: Iterable[str]) -> list[ReplicatedEntry]:
    """The parameters among `names` of which a tensor-parallel rank has more than its share. Alike ones are one entry."""
    program, size = lowered.program, lowered.mesh.tp
    if size == 1:
        return []
    words = lowered.policy.weight_entries(program.parameters, program.canonical_names())
    grouped: dict[tuple[str, str], list[int]] = {}
    for parameter in (program.parameters[name] for name in names):
        placement = parameter.layout.on("tp")
        if placement.is_sharded and placement.copies == 1:
            continue
        heads = size // placement.copies if placement.is_sharded else 1
        word = words.get(parameter.name)
        if word is None or word == "whole":
            why = _NO_ENTRY
        elif word == "rowwise":
            why = "rowwise splits what its module contracts, and this is added once, after the sum"
        else:
            why = f"it makes {heads} {'head' if heads == 1 else 'heads'}: each is replicated on {size // heads} ranks"
        what = ".".join("*" if segment.isdigit() else segment for segment in parameter.name.split("."))
        grouped.setdefault((what, why), []).append(math.prod(parameter.shape))
    return [
        {"what": what, "weights": len(sizes), "parameters": sum(sizes), "why": why} for (what, why), sizes in grouped.items()
    ]


def render(report: Report) -> str:
    """A report as text: the plan, memory, and messages added up over all units."""
    model, step, flops, options = report["model"], report["step"], report["flops"], report["policy"]["options"]
    lines = [
        f"{model['name']}: {model['parameters']:,} parameters, {model['layers']} layers",
        "mesh      " + " · ".join(f"{axis} {size}" for axis, size in report["mesh"].items()),
        f"policy    {report['policy']['source']}: " + ", ".join(f"{key} = {_word(value)}" for key, value in options.items()),
        f"step      {step['global_batch']} samples of {step['seq']} tokens, {step['micro_batch']} in a micro-batch of a rank",
        *_split(report),
        f"flops     {scaled(flops['model'])} of the model in a rank's step, {scaled(flops['hardware'])} run",
        "kernels   " + ", ".join(f"{entry['count']} {name}" for name, entry in report["kernels"].items()),
        *(f"missed    {entry['where']}: {entry['reason']}" for entry in report["missed"]),
        *(f"degraded  {entry['what']}: {entry['why']}" for entry in report["degraded"]),
    ]
    memory = _table("a rank holds between micro-batches", "bytes")
    host, *others = (report["memory"][name] for name in ("host", "parameters", "gradients", "optimizer"))
    for name, size in zip(("parameters", "gradients", "optimizer"), others, strict=True):
        memory.add_row(name, size_text(size))
    memory.add_section()
    memory.add_row("total", size_text(sum(others)))
    if host:
        memory.add_row("on the host", size_text(host))
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None)
    stages = [_stages(report["stages"])] if report["mesh"]["pp"] > 1 else []
    for table in (*stages, memory, _traffic(report["collectives"])):
        console.print(table)
    return "\n".join([*lines, *(line.rstrip() for line in text.getvalue().splitlines())]) + "\n"


def _split(report: Report) -> Iterable[str]:
    """How much of the parameters tensor parallelism splits, and what it replicates."""
    if report["mesh"]["tp"] > 1:
        yield f"split     {report['split']:.1%} of the parameters"
        norms = [entry for entry in report["replicated"] if entry["why"] == _NO_ENTRY and _NORM.search(entry["what"])]
        if norms:
            weights, elements = sum(norm["weights"] for norm in norms), sum(norm["parameters"] for norm in norms)
            yield f"replicated: {weights} norm weight{'s' * (weights != 1)}, {elements:,} elements"
        for entry in report["replicated"]:
            if entry not in norms:
                yield f"replicated: {entry['what']}, {entry['parameters']:,} elements: {entry['why']}"


def _stages(stages: Iterable[StageEntry]) -> Table:
    """One line per stage of the rank."""
    table = _table("a rank runs", "parameters", "flops", "bytes")
    for stage in stages:
        first, last = stage["units"][0], stage["units"][-1]
        units = first if first == last else f"{first} … {last}"
        table.add_row(units, f"{stage['parameters']:,}", scaled(stage["flops"]), size_text(stage["memory"]))
    return table


def _traffic(collectives: Iterable[CollectiveEntry]) -> Table:
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


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
