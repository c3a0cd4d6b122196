"""Faults planted in a lowered program, one at a time: a message that is not sent, sent along another axis or put together in
another order, one between two stages that is lost or another micro-batch's, a gradient that nobody adds up. Verification must
notice each by its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import EXCHANGES, Axis
from shardcomp.ir.mesh import SHARDING
from shardcomp.ir.printer import sources
from shardcomp.ir.program import PARAMETER, Program, Unit
from shardcomp.runtime.allocation import StageShard, users
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.gradients import Partial
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.stage import ModelStage, Pipeline

SILENT, SHIFTED, ASTRAY = "not sent", "pieces in another order", "sent along dp"
LOST, LATE = "zeros arrive", "that of the micro-batch before arrives"


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
    yield from _pipeline(program, blueprint)
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
        sharded._calls.unit_axes[name] = FaultyAxis(true.name, true.size, true.rank, true.group, phase, fault, other)

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


def _pipeline(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    """What goes wrong between two stages, and with the gradient of a weight that several of them use."""
    for stage in range(1, program.stages):
        for position, name in enumerate(program.received(stage)):
            where = f"{name}, stage {stage - 1} → {stage}"
            flows = program.values[name].requires_grad
            for fault in (LOST, LATE) if flows else (LOST,):
                yield Mutant(f"{where}: {fault}", blueprint, _plant_stage(stage, _arriving(position, fault)))
            if flows:
                yield Mutant(f"{where}: the gradient is {SILENT}", blueprint, _plant_stage(stage - 1, _lost_gradient(position)))
    for name, stages in users(blueprint).items():
        if len(stages) > 1 and blueprint.parameters[name].requires_grad:
            what = f"{name}: gradients of stages {', '.join(map(str, stages))} not added up"
            yield Mutant(what, blueprint, _plant_tie(name), gradient_of=name)
    if program.mesh.pp > 1:
        yield Mutant("the loss is not summed over pp", blueprint, _plant_silence("pp"))


def _plant_stage(index: int, change: Callable[[ModelStage], None]) -> Callable[[ShardedModel], None]:
    """Change a stage of every pipeline that a model makes."""

    def plant(sharded: ShardedModel) -> None:
        true = sharded._calls.pipeline

        def pipeline(*args: Any) -> Pipeline:
            made = true(*args)
            for stage in made.stages:
                if stage.stage_index == index:
                    change(stage)
            return made

        sharded._calls.pipeline = pipeline  # type: ignore[assignment, method-assign]

    return plant


def _arriving(position: int, fault: str) -> Callable[[ModelStage], None]:
    def change(stage: ModelStage) -> None:
        true = stage.forward_one_chunk
        seen: dict[int, Tensor] = {}

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            if index < stage.count:
                held = stage._arrived[index][position]
                seen[index] = held.clone()
                stage._arrived[index][position] = torch.zeros_like(held) if fault == LOST else seen[max(index - 1, 0)].clone()
            return true(index, *args, **kwargs)

        object.__setattr__(stage, "forward_one_chunk", forward)

    return change


def _lost_gradient(position: int) -> Callable[[ModelStage], None]:
    def change(stage: ModelStage) -> None:
        true = stage.backward_one_chunk

        def backward(index: int, *args: Any, **kwargs: Any) -> None:
            if index < stage.count:
                held = stage._gradients[index][position]
                stage._gradients[index][position] = None if held is None else torch.zeros_like(held)
            true(index, *args, **kwargs)

        object.__setattr__(stage, "backward_one_chunk", backward)

    return change


def _plant_tie(name: str) -> Callable[[ShardedModel], None]:
    """Leave out the sum over the stages that use a weight: over those of a rank, and over ranks."""

    def plant(sharded: ShardedModel) -> None:
        true = sharded._calls.partials

        def partials(blueprint: Blueprint) -> tuple[Partial, ...]:
            mutated = []
            for partial in true(blueprint):
                axes = tuple(axis for axis in partial.axes if axis.name != "pp")
                apart = [Partial(f"{name} {i}", (copy,), axes) for i, copy in enumerate(partial.copies)]
                mutated += apart if partial.name == name else [partial]
            return tuple(mutated)

        sharded._calls.partials = partials  # type: ignore[method-assign]

    return plant


def _plant_silence(name: str) -> Callable[[ShardedModel], None]:
    """Have nothing summed over an axis outside the units."""

    def plant(sharded: ShardedModel) -> None:
        axis = sharded._axes[name]
        sharded._axes[name] = FaultyAxis(axis.name, axis.size, axis.rank, axis.group, "forward", SILENT)

    return plant


def _data_parallel(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    trained = [u for u in program.units if any(program.parameters[name].trained for name in u.parameters)]
    shards = program.mesh.size(SHARDING[1]) if blueprint.zero else 1
    plants = ([_unscattered] if shards > 1 else []) + ([_unreduced] if shards < program.mesh.dp else [])
    for unit in {id(u.body): u for u in trained}.values():
        for change in plants:

            def plant(sharded: ShardedModel, unit: Unit = unit, change: Callable[[StageShard, Any], None] = change) -> None:
                for stage_shard in sharded._chunks:
                    for plan, home in zip(stage_shard.units, stage_shard.unit_parameters, strict=True):
                        if (plan.stage, plan.path) == (unit.plan.stage, unit.path):
                            change(stage_shard, _group(stage_shard, home))

            over = "dp" if len(plants) == 1 else SHARDING[1 - plants.index(change)]
            yield Mutant(f"{unit.path}: gradients not summed over {over}", blueprint, plant)
    yield Mutant("the loss and the count of labels are not summed over dp", blueprint, _plant_silence("dp"))


def _group(stage_shard: StageShard, home: Any) -> Any:
    """The module that gathers the parameters of a unit."""
    if any(True for _ in home.parameters()):
        return home
    return home.shared if home.shared.apart else stage_shard.root


def _unscattered(stage_shard: StageShard, module: Any) -> None:
    """Have each rank of a group keep its own gradients of its piece."""
    module.set_custom_reduce_scatter(_Unreduced())


def _unreduced(stage_shard: StageShard, module: Any) -> None:
    """Have the gradients of a group not summed over its copies."""
    kept = _Kept()
    module.set_custom_reduce_scatter(kept)
    module.set_all_reduce_hook(kept.put_back)


class _Unreduced:
    """A reduce-scatter that adds nothing up: each rank keeps its own piece."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        pieces = input_tensor.view(group.size(), -1)
        output_tensor.copy_(pieces[group.rank()].view_as(output_tensor))


class _Kept:
    """A reduce-scatter that remembers what this rank adds to the sum over copies, to put it back in the place of the sum."""

    def __init__(self) -> None:
        self.made = self.mine = torch.empty(0)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for what it passes in and then for the result, where there is nothing to scatter as well."""
        self.mine, self.made = self.made, torch.empty(*size, dtype=dtype, device=device)
        return self.made

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        output_tensor.copy_(Axis("dp", group.size(), group.rank(), group).reduce_scatter(input_tensor, 0))
        self.mine = output_tensor.clone()

    def put_back(self, total: Tensor) -> None:
        total.copy_(self.mine)
