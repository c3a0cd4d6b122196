"""The messages of one optimizer step, counted from a lowered Program: what the runtime will send, to the byte."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from shardcomp.cost.activations import repeated_messages
from shardcomp.cost.memory import Group, groups_of, padded_numel, shard_numel, shards
from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.layout import Size
from shardcomp.ir.mesh import FACTORS
from shardcomp.ir.nodes import form_of, value
from shardcomp.ir.precision import COMPUTE, MASTER
from shardcomp.ir.program import B, Program, S, Unit, Value
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.policy.options import Options
from shardcomp.runtime.agreement import WIDTH


@dataclass(frozen=True)
class Message:
    """Alike messages of one unit: `count` of them in a step, `bytes` in all, which is what this rank passes in."""

    op: str
    axis: str
    phase: str
    count: int
    bytes: int
    where: str


def messages(
    program: Program, options: Options, batch: int, length: int, micro_batches: int, rank: dict[str, int]
) -> list[Message]:
    """Every message that one rank sends in a step.

    batch, length: of one micro-batch. rank: its coordinates by axis. Axes of one rank send nothing.
    """
    sizes = {B: batch, S: length}
    sent: list[Message] = []
    stages = stages_of(program, options.schedule, rank)
    for unit in program.in_stages(stages):
        repeated = repeated_messages(program, unit, batch, length, rank)
        for op, axis, phase, size in (*_unit_messages(program, unit, rank), *repeated):
            sent.append(
                Message(op, axis, phase, micro_batches, micro_batches * int(sympy.sympify(size).subs(sizes)), unit.path)
            )
    for op, phase, where, size in _sends(program, stages, rank):
        sent.append(Message(op, "pp", phase, micro_batches, micro_batches * int(sympy.sympify(size).subs(sizes)), where))
    for stage in stages:
        for group in groups_of(program, stage):
            sent += _data_parallel(program, group, options, micro_batches, rank)
    sent += _step(program, held_by(program, stages), options, rank)
    return _merged(message for message in sent if program.mesh.size(message.axis) > 1)


def stages_of(program: Program, schedule: str, rank: dict[str, int]) -> list[int]:
    """The stages that the rank at these coordinates runs."""
    if program.stages == 1:
        return [0]
    return SCHEDULES[schedule].stages_of(rank["pp"], program.mesh.pp, program.stages)


def held_by(program: Program, stages: Collection[int]) -> list[str]:
    """The parameters that a rank has which runs these stages."""
    if len(stages) == program.stages:
        return list(program.parameters)
    used = {name for unit in program.in_stages(stages) for name in unit.parameters}
    return [name for name in program.parameters if name in used]


def _sends(program: Program, stages: list[int], rank: dict[str, int]) -> Iterator[tuple[str, str, str, Size]]:
    """What these stages send in one micro-batch: values to the stage after, gradients to the one before. Nothing is sent
    between two stages of one rank."""
    for stage in stages:
        for other, phase in ((stage + 1, "forward"), (stage - 1, "backward")):
            if not 0 <= other < program.stages or other in stages:
                continue
            # Backward, the gradients of what was received go back to where it came from.
            crossing = program.sent(stage) if phase == "forward" else program.received(stage)
            for name in crossing:
                tensor = program.values[name]
                if phase == "forward" or tensor.requires_grad:
                    yield "send", phase, f"stage {stage} → {other}", _bytes(program, tensor, rank)


def _unit_messages(program: Program, unit: Unit, rank: dict[str, int]) -> Iterator[tuple[str, str, str, Size]]:
    for node in unit.body.calls():
        if node.target in EXCHANGES:
            # The axis is the last argument of every collective.
            exchange, axis = EXCHANGES[node.target], str(node.args[-1])
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            if exchange.forward:
                yield exchange.forward, axis, "forward", _bytes(program, value(operand), rank)
            # The backward passes in the gradient of the result, which has the result's shape.
            if exchange.backward and value(node).requires_grad:
                yield exchange.backward, axis, "backward", _bytes(program, value(node), rank)
        elif form_of(node) is not None:
            # A split form, such as a loss over a sharded vocabulary, sends messages itself and lists them.
            for op, phase, shape, dtype in form_of(node).exchanges(node):
                yield op, str(node.args[-1]), phase, sympy.prod(shape) * dtype.itemsize


def _bytes(program: Program, tensor: Value, rank: dict[str, int]) -> Size:
    shape = tensor.layout.local_shape(tensor.shape, program.mesh.as_dict(), rank)
    return sympy.prod(shape) * tensor.dtype.itemsize


def _data_parallel(
    program: Program, group: Group, options: Options, micro_batches: int, rank: dict[str, int]
) -> Iterator[Message]:
    """Parameters are gathered once a step, or where they are resharded after forward, for every use in a forward or a backward.
    Gradients are summed once a step, or from zero = 2 for every micro-batch."""
    shard_count, compute, master = shards(program, options), COMPUTE[options.precision], MASTER[options.precision]
    # FSDP pads each parameter to shards of one size, and sends the padding, too.
    if shard_count > 1:
        size = sum(padded_numel(program, name, shard_count, rank) for name in group.names) // shard_count * compute.itemsize
        times = micro_batches * group.users if group.reshard else 1
        yield Message("all_gather", "dp", "forward", times, times * size, group.where)
        if group.reshard and group.passes_back:
            times = micro_batches * group.passes_back
            yield Message("all_gather", "dp", "backward", times, times * size, group.where)
    trained = [name for name in group.names if program.parameters[name].trained]
    if not trained:
        return
    # Gradients are reduced in the dtype of the masters.
    size = sum(padded_numel(program, name, shard_count, rank) for name in trained) * master.itemsize
    times = micro_batches if options.zero >= 2 else 1
    if shard_count > 1:
        yield Message("reduce_scatter", "dp", "backward", times, times * size, group.where)
    # Each group of ranks has reduced its own gradients: now every shard is summed over the groups.
    if shard_count < program.mesh.dp:
        yield Message("all_reduce", "dp", "backward", times, times * size // shard_count, group.where)


def _step(program: Program, param_names: list[str], options: Options, rank: dict[str, int]) -> Iterator[Message]:
    """Once per step: what ranks compare, the labels that count among it; the loss and whether gradients are finite; the
    partial gradients, and the gradients of tied weights that several pipeline ranks have."""
    master, shard_count = MASTER[options.precision].itemsize, shards(program, options)
    if "loss" in program.outputs:
        for axis in ("tp", "pp", "dp") if options.compare_ranks else ("pp", "dp"):
            yield Message("all_gather", axis, "step", 1, WIDTH * torch.int64.itemsize, "what ranks compare")
        for axis in ("dp", "pp"):
            yield Message("all_reduce", axis, "step", 1, 2 * master, "loss and ranks whose gradients are not finite")
        yield Message("all_reduce", "tp", "step", 1, master, "ranks whose gradients are not finite")
    holders = pipeline_ranks(program, options)
    partial: dict[str, int] = {}
    tied: dict[tuple[int, ...], int] = {}
    for name in param_names:
        parameter = program.parameters[name]
        if parameter.trained:
            size = shard_numel(program, name, shard_count, rank) * master
            # FSDP takes no 0-d parameters, so these are summed over dp here.
            for axis in (*parameter.partial_gradient, *(() if parameter.shape else ("dp",))):
                if program.mesh.size(axis) > 1:
                    partial[axis] = partial.get(axis, 0) + size
            # Such as an embedding in the first stage that is also the head of the last one.
            if len(holders.get(name, ())) > 1:
                tied[holders[name]] = tied.get(holders[name], 0) + size
    for axis, size in partial.items():
        yield Message("all_reduce", "tp" if axis in FACTORS else axis, "step", 1, size, "partial gradients")
    for ranks, size in tied.items():
        yield Message("all_reduce", "pp", "step", 1, size, f"weights of pipeline ranks {', '.join(map(str, ranks))}")


def pipeline_ranks(program: Program, options: Options) -> dict[str, tuple[int, ...]]:
    """The pipeline ranks that hold each parameter that a unit uses."""
    ranks_of: dict[str, set[int]] = {}
    for unit in program.units:
        place = SCHEDULES[options.schedule].rank_of(unit.plan.stage, program.mesh.pp)
        for name in unit.parameters:
            ranks_of.setdefault(name, set()).add(place)
    return {name: tuple(sorted(ranks)) for name, ranks in ranks_of.items()}


def _merged(messages: Iterable[Message]) -> list[Message]:
    """Messages of the same kind in the same place as one entry."""
    merged: dict[tuple[str, str, str, str], Message] = {}
    for m in messages:
        key = (m.op, m.axis, m.phase, m.where)
        before = merged.get(key)
        merged[key] = m if before is None else Message(*key[:3], before.count + m.count, before.bytes + m.bytes, m.where)
    return list(merged.values())
