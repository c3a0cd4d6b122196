"""Faults planted in a lowered program, one at a time: a message that is not sent, sent along another axis or put together in
another order, a partial gradient that nobody adds up. Verification must notice each by its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule

from shardcomp.collectives import EXCHANGES, Axis
from shardcomp.inspect.listing import sources
from shardcomp.program import PARAMETER, Program, Unit
from shardcomp.runtime.allocation import Chunk
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.model import ShardedModel

SILENT, SHIFTED, ASTRAY = "not sent", "pieces in another order", "sent along dp"


@dataclass(frozen=True)
class FaultyAxis(Axis):
    """An axis that does one thing wrong in one phase, and everything else right. Shapes are as they should be."""

    phase: str = "forward"
    fault: str = SILENT
    other: Axis | None = None

    def _acts(self) -> bool:
        backward = torch._C._current_graph_task_id() != -1
        return backward == (self.phase == "backward")

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._acts():
            return super().all_reduce(x)
        return self.other.all_reduce(x) if self.fault == ASTRAY and self.other else x.clone()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        if not self._acts():
            return super().all_gather(x, dim)
        if self.fault == SHIFTED:
            return super().all_gather(x, dim).roll(x.shape[dim], dim)
        if self.fault == ASTRAY and self.other:
            return self.other.all_gather(x, dim)
        return torch.cat([x] * self.size, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        if not self._acts():
            return super().reduce_scatter(x, dim)
        if self.fault == SHIFTED:
            return super().reduce_scatter(x.roll(x.shape[dim] // self.size, dim), dim)
        if self.fault == ASTRAY and self.other:
            return self.other.reduce_scatter(x, dim)
        return self.piece(x, dim)

    def all_to_all(self, x: Tensor, gather: int, scatter: int) -> Tensor:
        if not self._acts():
            return super().all_to_all(x, gather, scatter)
        if self.fault == SHIFTED:
            moved = super().all_to_all(x, gather, scatter)
            return moved.roll(moved.shape[gather] // self.size, gather)
        return torch.cat([self.piece(x, scatter)] * self.size, gather)


@dataclass(frozen=True)
class Mutant:
    """One fault: what it is, the blueprint that has it, and what it changes on a built model. `gradient_of`: the
    parameter whose gradient alone it falsifies, if there is one."""

    what: str
    blueprint: Blueprint
    plant: Callable[[ShardedModel], None] = lambda sharded: None
    gradient_of: str | None = None


def mutants(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    """Every fault, enumerated from the Program: alike units count once."""
    yield from _messages(program, blueprint)
    yield from _partial_gradients(program, blueprint)
    if program.mesh.dp > 1:
        yield from _data_parallel(program, blueprint)


def _messages(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    for unit in {id(u.body): u for u in program.units}.values():
        for node in unit.body.calls():
            for operation, phase in _sent(node):
                for fault in _faults(operation, node, program):
                    name = f"{node.args[-1]}_faulty"
                    texts = _with_axis(program, node, name)
                    where = ".".join(part for part in (unit.path, node.meta["path"]) if part)
                    what = f"{where}: {node.target.__name__}, {operation} in {phase}: {fault}"  # type: ignore[union-attr]
                    yield Mutant(what, replace(blueprint, sources=texts), _plant_axis(name, str(node.args[-1]), phase, fault))


def _sent(node: fx.Node) -> Iterator[tuple[str, str]]:
    """The messages of a node: (operation, phase). The backward ones only where a gradient flows."""
    if node.target in EXCHANGES:
        exchange = EXCHANGES[node.target]
        if exchange.forward:
            yield exchange.forward, "forward"
        if exchange.backward and node.meta["value"].requires_grad:
            yield exchange.backward, "backward"
    elif "form" in node.meta:
        yield from ((operation, phase) for operation, phase, _, _ in node.meta["form"].exchanges(node))


def _faults(operation: str, node: fx.Node, program: Program) -> list[str]:
    """What can go wrong with a message and leave every shape right. A split form adds up what it gathers, in whatever order."""
    faults = [SILENT]
    if operation != "all_reduce" and "form" not in node.meta:
        faults.append(SHIFTED)
    if program.mesh.dp > 1 and (operation == "all_reduce" or program.mesh.dp == program.mesh.tp):
        faults.append(ASTRAY)
    return faults


def _with_axis(program: Program, node: fx.Node, name: str) -> tuple[str, ...]:
    """The sources with one operator's axis exchanged."""
    kept = node.args
    node.args = (*node.args[:-1], name)
    try:
        return tuple(sources(program))
    finally:
        node.args = kept


def _plant_axis(name: str, axis: str, phase: str, fault: str) -> Callable[[ShardedModel], None]:
    def plant(sharded: ShardedModel) -> None:
        true = sharded._axes[axis]
        other = sharded._axes["dp"]
        sharded._unit_axes[name] = FaultyAxis(true.name, true.size, true.rank, true.group, phase, fault, other)

    return plant


def _partial_gradients(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    seen: set[tuple[int, int]] = set()
    for unit in program.units:
        for index, (_, name) in enumerate(zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True)):
            key = (id(unit.body), index)
            if blueprint.parameters[name].partial_gradient and key not in seen:
                seen.add(key)
                plan = replace(blueprint.parameters[name], partial_gradient=())
                changed = {**blueprint.parameters, name: plan}
                faulty = replace(blueprint, parameters=changed)
                yield Mutant(f"{name}: partial gradient not added up", faulty, gradient_of=name)


def _data_parallel(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    for unit in {id(u.body): u for u in program.units if u.parameters}.values():

        def unreduced(sharded: ShardedModel, unit: Unit = unit) -> None:
            for chunk in sharded._chunks:
                for plan, home in zip(chunk.units, chunk.homes, strict=True):
                    if (plan.stage, plan.path) == (unit.plan.stage, unit.path):
                        _leave_unreduced(chunk, home)

        yield Mutant(f"{unit.path}: gradients not summed over dp", blueprint, unreduced)

    def silent(sharded: ShardedModel) -> None:
        dp = sharded._axes["dp"]
        sharded._axes["dp"] = FaultyAxis(dp.name, dp.size, dp.rank, dp.group, "forward", SILENT)

    yield Mutant("the loss and the count of labels are not summed over dp", blueprint, silent)


def _leave_unreduced(chunk: Chunk, home: Any) -> None:
    """Have a group's gradients reduced without the other ranks' part."""
    module = home if any(True for _ in home.parameters()) else home.shared if home.shared.apart else chunk.root
    if isinstance(module, ReplicateModule):
        true = chunk.root.set_requires_gradient_sync

        def without(sync: bool) -> None:
            true(sync)  # type: ignore[operator]
            module.set_requires_all_reduce(False, recurse=False)

        object.__setattr__(chunk.root, "set_requires_gradient_sync", without)
    else:
        module.set_custom_reduce_scatter(_Unreduced())  # type: ignore[operator, union-attr]


class _Unreduced:
    """A reduce-scatter that adds nothing up: each rank keeps its own piece."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        pieces = input_tensor.view(group.size(), -1)
        output_tensor.copy_(pieces[group.rank()].view_as(output_tensor))
