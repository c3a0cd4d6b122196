"""Mutants: deliberately wrong programs, enumerated from a lowered one. `verify --mutate` must notice each by its numbers.

A mutant has one error. A collective is not sent, is sent along another axis, or is joined in another order. A message between
two stages is lost, or is another micro-batch's. A partial gradient is not reduced. Every shape stays right, so that only the
numbers are wrong.
"""

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
from shardcomp.runtime.allocation import users
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.gradients import Partial
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.stage import ModelStage, Pipeline
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.torch_private import NO_GRAPH_TASK, current_graph_task

SILENT, SHIFTED, ASTRAY = "not sent", "joined in another order", "sent along dp"
"""The errors of a collective."""
LOST, LATE = "zeros arrive", "the previous micro-batch's arrives"
"""The errors of a message between two stages."""


@dataclass(frozen=True)
class MutantAxis(Axis):
    """An axis whose collectives have an error in one phase.

    phase: "forward" or "backward". other: the axis that they are sent along instead, if the error is `ASTRAY`.
    """

    phase: str = "forward"
    error: str = SILENT
    other: Axis | None = None

    def _is_wrong_now(self) -> bool:
        is_backward = current_graph_task() != NO_GRAPH_TASK
        return is_backward == (self.phase == "backward")

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._is_wrong_now():
            return super().all_reduce(x)
        return self.other.all_reduce(x) if self.error == ASTRAY and self.other else x.clone()

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        if not self._is_wrong_now():
            return super().all_gather(x, dim)
        if self.error == SHIFTED:
            return super().all_gather(x, dim).roll(x.shape[dim], dim)
        if self.error == ASTRAY and self.other:
            return self.other.all_gather(x, dim)
        return torch.cat([x] * self.size, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        if not self._is_wrong_now():
            return super().reduce_scatter(x, dim)
        if self.error == SHIFTED:
            return super().reduce_scatter(x.roll(x.shape[dim] // self.size, dim), dim)
        if self.error == ASTRAY and self.other:
            return self.other.reduce_scatter(x, dim)
        return self.local_shard(x, dim)

    def all_to_all(self, x: Tensor, gather: int, scatter: int) -> Tensor:
        if not self._is_wrong_now():
            return super().all_to_all(x, gather, scatter)
        if self.error == SHIFTED:
            result = super().all_to_all(x, gather, scatter)
            return result.roll(result.shape[gather] // self.size, gather)
        return torch.cat([self.local_shard(x, scatter)] * self.size, gather)


@dataclass(frozen=True)
class Mutant:
    """A program with one error."""

    what: str
    """The error, in words."""
    blueprint: Blueprint
    """The program's, with the error if that is in the emitted code or in a parameter's plan."""
    plant: Callable[[ShardedModel], None] = lambda sharded: None
    """Changes the model that is built from the blueprint, if the error is in what runs the code."""
    gradient_of: str | None = None
    """The parameter whose gradient is all that the error falsifies, if there is one."""


def mutants(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    """Every mutant of a program. Units that share a body have theirs once."""
    yield from _collectives(program, blueprint)
    yield from _partial_gradients(program, blueprint)
    yield from _pipeline(program, blueprint)
    if program.mesh.dp > 1:
        yield from _data_parallel(program, blueprint)


def _collectives(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    for unit in {id(u.body): u for u in program.units}.values():
        for node in unit.body.calls():
            for operation, phase in _collectives_of(node):
                for error in _possible_errors(operation, node, program):
                    axis = str(node.args[-1])
                    name = f"{axis}_mutant"
                    texts = _with_axis(program, node, name)
                    where = ".".join(path for path in (unit.path, node.meta["path"]) if path)
                    what = f"{where}: {node.target.__name__}, {operation} in {phase}: {error}"  # type: ignore[union-attr]
                    yield Mutant(what, replace(blueprint, sources=texts), _plant_axis(name, axis, phase, error))


def _collectives_of(node: fx.Node) -> Iterator[tuple[str, str]]:
    """The collectives of a node: (operation, phase). The backward has one only where a gradient flows."""
    if node.target in EXCHANGES:
        exchange = EXCHANGES[node.target]
        if exchange.forward:
            yield exchange.forward, "forward"
        if exchange.backward and node.meta["value"].requires_grad:
            yield exchange.backward, "backward"
    elif "form" in node.meta:
        yield from ((operation, phase) for operation, phase, _, _ in node.meta["form"].exchanges(node))


def _possible_errors(operation: str, node: fx.Node, program: Program) -> list[str]:
    """The errors of a collective that leave every shape right, and some number wrong."""
    errors = [SILENT]
    # An all-reduce has no order. A split form adds up what it gathers, so that order does not matter either.
    if operation != "all_reduce" and "form" not in node.meta:
        errors.append(SHIFTED)
    if program.mesh.dp > 1 and (operation == "all_reduce" or program.mesh.dp == program.mesh.tp):
        errors.append(ASTRAY)
    return errors


def _with_axis(program: Program, node: fx.Node, name: str) -> tuple[str, ...]:
    """The emitted sources with another axis for one node."""
    args = node.args
    node.args = (*args[:-1], name)
    try:
        return tuple(sources(program))
    finally:
        node.args = args


def _plant_axis(name: str, axis: str, phase: str, error: str) -> Callable[[ShardedModel], None]:
    def plant(sharded: ShardedModel) -> None:
        right = sharded._axes[axis]
        other = sharded._axes["dp"]
        sharded._calls.unit_axes[name] = MutantAxis(right.name, right.size, right.rank, right.group, phase, error, other)

    return plant


def _partial_gradients(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    seen: set[tuple[int, int]] = set()
    for unit in program.units:
        for index, (_, name) in enumerate(zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True)):
            key = (id(unit.body), index)
            if blueprint.parameters[name].partial_gradient and key not in seen:
                seen.add(key)
                plan = replace(blueprint.parameters[name], partial_gradient=())
                mutant = replace(blueprint, parameters={**blueprint.parameters, name: plan})
                yield Mutant(f"{name}: partial gradient not reduced", mutant, gradient_of=name)


def _pipeline(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    """Errors between two stages, and in the gradient of a weight that several stages use."""
    for stage in range(1, program.stages):
        for position, name in enumerate(program.received(stage)):
            where = f"{name}, stage {stage - 1} → {stage}"
            has_gradient = program.values[name].requires_grad
            # What has no gradient, such as a mask, may be equal for all micro-batches: an earlier one's changes nothing then.
            for error in (LOST, LATE) if has_gradient else (LOST,):
                yield Mutant(f"{where}: {error}", blueprint, _plant_stage(stage, _wrong_arrival(position, error)))
            if has_gradient:
                yield Mutant(f"{where}: the gradient is {SILENT}", blueprint, _plant_stage(stage - 1, _lost_gradient(position)))
    for name, stages in users(blueprint).items():
        if len(stages) > 1 and blueprint.parameters[name].requires_grad:
            what = f"{name}: gradients of stages {', '.join(map(str, stages))} not reduced"
            yield Mutant(what, blueprint, _plant_tie(name), gradient_of=name)
    if program.mesh.pp > 1:
        yield Mutant("the loss is not summed over pp", blueprint, _plant_silent_axis("pp"))


def _plant_stage(index: int, change: Callable[[ModelStage], None]) -> Callable[[ShardedModel], None]:
    """Change a stage of every pipeline that a model makes."""

    def plant(sharded: ShardedModel) -> None:
        make_pipeline = sharded._calls.pipeline

        def pipeline(*args: Any) -> Pipeline:
            result = make_pipeline(*args)
            for stage in result.stages:
                if stage.stage_index == index:
                    change(stage)
            return result

        sharded._calls.pipeline = pipeline  # type: ignore[assignment, method-assign]

    return plant


def _wrong_arrival(position: int, error: str) -> Callable[[ModelStage], None]:
    """Replace what a stage receives at a position: by zeros, or by what arrived for the previous micro-batch."""

    def change(stage: ModelStage) -> None:
        forward_one_chunk = stage.forward_one_chunk
        arrived: dict[int, Tensor] = {}

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            if index < stage.count:
                tensor = stage._arrived[index][position]
                arrived[index] = tensor.clone()
                wrong = torch.zeros_like(tensor) if error == LOST else arrived[max(index - 1, 0)].clone()
                stage._arrived[index][position] = wrong
            return forward_one_chunk(index, *args, **kwargs)

        object.__setattr__(stage, "forward_one_chunk", forward)

    return change


def _lost_gradient(position: int) -> Callable[[ModelStage], None]:
    """Replace the gradient that a stage receives at a position by zeros."""

    def change(stage: ModelStage) -> None:
        backward_one_chunk = stage.backward_one_chunk

        def backward(index: int, *args: Any, **kwargs: Any) -> None:
            if index < stage.count:
                gradient = stage._gradients[index][position]
                stage._gradients[index][position] = None if gradient is None else torch.zeros_like(gradient)
            backward_one_chunk(index, *args, **kwargs)

        object.__setattr__(stage, "backward_one_chunk", backward)

    return change


def _plant_tie(name: str) -> Callable[[ShardedModel], None]:
    """Leave out the sum over the stages that use a weight, stages of one rank and of several."""

    def plant(sharded: ShardedModel) -> None:
        true_partials = sharded._calls.partials

        def partials(blueprint: Blueprint) -> tuple[Partial, ...]:
            result = []
            for partial in true_partials(blueprint):
                axes = tuple(axis for axis in partial.axes if axis.name != "pp")
                separate = [Partial(f"{name} {i}", (copy,), axes) for i, copy in enumerate(partial.copies)]
                result += separate if partial.name == name else [partial]
            return tuple(result)

        sharded._calls.partials = partials  # type: ignore[method-assign]

    return plant


def _plant_silent_axis(name: str) -> Callable[[ShardedModel], None]:
    """Leave out every collective along an axis outside of units."""

    def plant(sharded: ShardedModel) -> None:
        axis = sharded._axes[name]
        sharded._axes[name] = MutantAxis(axis.name, axis.size, axis.rank, axis.group, "forward", SILENT)

    return plant


def _data_parallel(program: Program, blueprint: Blueprint) -> Iterator[Mutant]:
    trained = [u for u in program.units if any(program.parameters[name].trained for name in u.parameters)]
    shards = program.mesh.size(SHARDING[1]) if blueprint.zero else 1
    changes = ([_skip_scatter] if shards > 1 else []) + ([_skip_copies] if shards < program.mesh.dp else [])
    for unit in {id(u.body): u for u in trained}.values():
        for change in changes:

            def plant(sharded: ShardedModel, unit: Unit = unit, change: Callable[[Any], None] = change) -> None:
                for stage_shard in sharded._stage_shards:
                    for plan, unit_params in zip(stage_shard.units, stage_shard.unit_parameters, strict=True):
                        if (plan.stage, plan.path) == (unit.plan.stage, unit.path):
                            change(_fsdp_module(stage_shard, unit_params))

            axis = "dp" if len(changes) == 1 else SHARDING[1 - changes.index(change)]
            yield Mutant(f"{unit.path}: gradients not summed over {axis}", blueprint, plant)
    yield Mutant("the loss and the count of labels are not summed over dp", blueprint, _plant_silent_axis("dp"))


def _fsdp_module(stage_shard: StageShard, unit_params: Any) -> Any:
    """The module whose FSDP group has the parameters of a unit: its own, or the one that shares them with other units."""
    if any(True for _ in unit_params.parameters()):
        return unit_params
    return unit_params.shared if unit_params.shared.apart else stage_shard.root


def _skip_scatter(module: Any) -> None:
    """Have each rank keep its own gradients of its shard, in place of their sum over the group."""
    module.set_custom_reduce_scatter(_KeepOwnShard())


def _skip_copies(module: Any) -> None:
    """Have each rank keep the gradients of its own group, in place of their sum over the copies of what ZeRO shards."""
    comm = _KeepOwnGroup()
    module.set_custom_reduce_scatter(comm)
    module.set_all_reduce_hook(comm.restore)


class _KeepOwnShard:
    """A reduce-scatter without the reduction: each rank takes its shard of its own gradients."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        shards = input_tensor.view(group.size(), -1)
        output_tensor.copy_(shards[group.rank()].view_as(output_tensor))


class _KeepOwnGroup:
    """A reduce-scatter that remembers its result. After the all-reduce over copies, `restore` puts it in place of the sum."""

    def __init__(self) -> None:
        self.newest = self.own = torch.empty(0)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP allocates the input, then the output. It does not call where there is nothing to scatter: the input, allocated
        last but one, is what this rank adds then."""
        self.own, self.newest = self.newest, torch.empty(*size, dtype=dtype, device=device)
        return self.newest

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        output_tensor.copy_(Axis("dp", group.size(), group.rank(), group).reduce_scatter(input_tensor, 0))
        self.own = output_tensor.clone()

    def restore(self, total: Tensor) -> None:
        total.copy_(self.own)
