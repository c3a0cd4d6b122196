"""The messages of one optimizer step, counted from a lowered Program: what the runtime will send, to the byte."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from shardcomp.collectives import EXCHANGES
from shardcomp.layout import Size
from shardcomp.program import B, Program, S, Unit, Value, value
from shardcomp.schedules import SCHEDULES


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
    program: Program,
    master: torch.dtype,
    batch: int,
    length: int,
    micro_batches: int,
    rank: dict[str, int],
    schedule: str = "1f1b",
) -> list[Message]:
    """Every message that one rank sends in a step.

    master: the dtype of gradients. batch, length: of one micro-batch. rank: its coordinates by axis. schedule: what says which
    stages it runs. Axes of one rank send nothing.
    """
    sizes = {B: batch, S: length}
    found: list[Message] = []
    stages = stages_of(program, schedule, rank)
    units = program.in_stages(stages)
    for unit in units:
        for op, axis, phase, each in _unit_messages(program, unit, rank):
            found.append(
                Message(op, axis, phase, micro_batches, micro_batches * int(sympy.sympify(each).subs(sizes)), unit.path)
            )
    for op, phase, where, each in _sends(program, stages, rank):
        found.append(Message(op, "pp", phase, micro_batches, micro_batches * int(sympy.sympify(each).subs(sizes)), where))
    found += _data_parallel(program, units, master, rank)
    found += _step(program, held_by(program, stages), master, rank)
    return _merged(message for message in found if program.mesh.size(message.axis) > 1)


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
            crossing = program.sent(stage) if phase == "forward" else program.received(stage)
            for name in crossing:
                held = program.values[name]
                if phase == "forward" or held.requires_grad:
                    yield "send", phase, f"stage {stage} → {other}", _bytes(program, held, rank)


def _unit_messages(program: Program, unit: Unit, rank: dict[str, int]) -> Iterator[tuple[str, str, str, Size]]:
    for node in unit.body.calls():
        if node.target in EXCHANGES:
            exchange, axis = EXCHANGES[node.target], str(node.args[-1])
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            if exchange.forward:
                yield exchange.forward, axis, "forward", _bytes(program, value(operand), rank)
            if exchange.backward and value(node).requires_grad:
                yield exchange.backward, axis, "backward", _bytes(program, value(node), rank)
        elif "form" in node.meta:
            for op, phase, shape, dtype in node.meta["form"].exchanges(node):
                yield op, str(node.args[-1]), phase, sympy.prod(shape) * dtype.itemsize


def _bytes(program: Program, held: Value, rank: dict[str, int]) -> Size:
    shape = held.layout.local_shape(held.shape, program.mesh.as_dict(), rank)
    return sympy.prod(shape) * held.dtype.itemsize


def local_numel(program: Program, name: str, rank: dict[str, int]) -> int:
    """The number of elements of a parameter that the rank at these coordinates holds."""
    parameter = program.parameters[name]
    return int(sympy.prod(parameter.layout.local_shape(parameter.shape, program.mesh.as_dict(), rank)))


def _data_parallel(program: Program, units: list[Unit], master: torch.dtype, rank: dict[str, int]) -> Iterator[Message]:
    """One sum over dp for the gradients of each unit, and one for those that several units share."""
    users: dict[str, int] = {}
    for unit in units:
        for module in {name.rpartition(".")[0] for name in unit.parameters}:
            users[module] = users.get(module, 0) + 1
    groups: list[tuple[str, list[str]]] = []
    shared: dict[str, None] = {}
    for unit in units:
        own = [name for name in unit.parameters if users[name.rpartition(".")[0]] == 1]
        shared.update(dict.fromkeys(name for name in unit.parameters if name not in own))
        groups.append((unit.path, own))
    groups.append(("shared by several units", list(shared)))
    for where, names in groups:
        numel = sum(local_numel(program, name, rank) for name in names if program.parameters[name].requires_grad)
        if numel:
            yield Message("all_reduce", "dp", "backward", 1, numel * master.itemsize, where)


def _step(program: Program, held: list[str], master: torch.dtype, rank: dict[str, int]) -> Iterator[Message]:
    """Once per step: the count of labels, the loss, and the gradients that come out partial."""
    if "loss" in program.outputs:
        loss = program.values[program.outputs["loss"]]
        yield Message("all_reduce", "dp", "step", 1, torch.int64.itemsize, "count of labels")
        yield Message("all_reduce", "dp", "step", 1, loss.dtype.itemsize, "loss")
    partial = [p for p in (program.parameters[name] for name in held) if p.requires_grad]
    for axis in dict.fromkeys(axis for p in partial for axis in p.partial_gradient):
        numel = sum(local_numel(program, p.name, rank) for p in partial if axis in p.partial_gradient)
        yield Message("all_reduce", axis, "step", 1, numel * master.itemsize, "partial gradients")


def _merged(found: Iterator[Message]) -> list[Message]:
    """Messages of the same kind in the same place as one entry."""
    merged: dict[tuple[str, str, str, str], Message] = {}
    for m in found:
        key = (m.op, m.axis, m.phase, m.where)
        before = merged.get(key)
        merged[key] = m if before is None else Message(*key[:3], before.count + m.count, before.bytes + m.bytes, m.where)
    return list(merged.values())
