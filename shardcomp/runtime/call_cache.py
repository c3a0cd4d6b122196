"""The code that a rank runs for each call of a model: emitted Python bound to the parameters that were allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.allocation import users
from shardcomp.runtime.blueprint import Blueprint, UnitPlan
from shardcomp.runtime.fsdp import reshard
from shardcomp.runtime.gradients import Partial
from shardcomp.runtime.random import Streams
from shardcomp.runtime.stage import ModelStage, Pipeline
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.runtime.unit import Stage, UnitParameters

CallSignature = tuple[tuple[tuple[str, int], ...], tuple[str, ...], bool | None]
"""The inputs as (name, number of dims), the names of the outputs, and the mode: training or not, or None where modules are in
different modes."""
Trained = frozenset[str] | None
"""The names of the parameters that are trained; None for those that were when the model was sharded."""
Lower = Callable[[CallSignature, tuple[int, int], Trained], Blueprint]
"""Lowers a call at (batch, length), which matters only for models with static shapes."""


@dataclass(frozen=True, eq=False)
class LoadedCall:
    """The code of one call signature on this rank: its stages, and the parameters whose gradient it leaves partial."""

    blueprint: Blueprint
    stages: list[Stage]
    partials: tuple[Partial, ...]
    pipeline: Pipeline | None


class CallCache:
    """The code of every call of a model, lowered when its signature is first met. A model with static shapes is lowered for
    every new shape as well. All calls share the parameters that were allocated for the first, `blueprint`.

    model: has the parameters and buffers, by their names on this rank. unit_axes: the axes of the units' collectives, a copy of
    `axes`, which serves everything else. tied: as `tied_axes` returns them. lower: None where there is only the source of one
    call.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprint: Blueprint,
        stage_shards: list[StageShard],
        axes: Mapping[str, Axis],
        tied: Mapping[tuple[int, ...], Axis],
        device: torch.device,
        random: Streams,
        lower: Lower | None,
    ) -> None:
        self.model, self.blueprint, self.stage_shards, self.tied = model, blueprint, stage_shards, tied
        self.axes, self.unit_axes, self.device, self.random, self.lower = axes, dict(axes), device, random, lower
        self.loaded: dict[tuple[CallSignature, tuple[int, int] | None, Trained], LoadedCall] = {}
        self.trained: Trained = None
        """What calls train from now on."""
        self._users = users(blueprint)

    def of(self, batch: Mapping[str, Tensor], outputs: tuple[str, ...], training: bool | None) -> LoadedCall:
        """The code for a call with these inputs. Raises PlanError for one that the allocated parameters do not serve."""
        call: CallSignature = (tuple(sorted((name, tensor.dim()) for name, tensor in batch.items())), outputs, training)
        rows, length = next(iter(batch.values())).shape[:2]
        for shape in (None, (rows, length)):
            if (call, shape, self.trained) in self.loaded:
                return self.loaded[call, shape, self.trained]
        blueprint = self._blueprint_for(call, (rows, length))
        stages = [
            blueprint.module(stage_shard.index).Model(
                self._unit_parameters(blueprint, stage_shard), self.unit_axes, self.device, self.random
            )
            for stage_shard in self.stage_shards
        ]
        if blueprint.compile:
            for unit in (unit for stage in stages for unit in stage.units):
                unit.compile()
        pipeline = self.pipeline(blueprint, stages) if blueprint.mesh.pp > 1 else None
        loaded = LoadedCall(blueprint, stages, self.partials(blueprint), pipeline)
        self.loaded[call, blueprint.static_shape, self.trained] = loaded
        return loaded

    def _blueprint_for(self, call: CallSignature, shape: tuple[int, int]) -> Blueprint:
        inputs, outputs, training = call
        first = self.blueprint
        same = (tuple(sorted(first.inputs)), first.outputs, first.training) == (tuple(n for n, _ in inputs), outputs, training)
        if same and first.static_shape in (None, shape) and self.trained is None:
            return first
        has = f"({', '.join(first.inputs)}) -> ({', '.join(first.outputs)}), training = {first.training}"
        if self.lower is None and self.trained is not None:
            frozen = sorted(name for name in self.trained if not first.parameters[name].requires_grad)
            raise PlanError(
                f"this source was written with {', '.join(frozen[:3])} frozen{_and_more(frozen)}: it has no sums of their "
                "gradients over ranks. Save the source of a model where they have requires_grad"
            )
        if self.lower is None:
            asked = f"({', '.join(name for name, _ in inputs)}) -> ({', '.join(outputs)}), training = {training}, shape {shape}"
            raise PlanError(f"this source was written for {has}, shape {first.static_shape or 'any'}; the call is {asked}")
        blueprint = self.lower(call, shape, self.trained)
        if violation := _not_allocated(first, blueprint):
            raise PlanError(
                f"the call ({', '.join(blueprint.inputs)}) -> ({', '.join(outputs)}) {violation} for the call {has}"
            )
        return blueprint

    def _unit_parameters(self, blueprint: Blueprint, stage_shard: StageShard) -> list[UnitParameters]:
        """The parameters of a call's units in one stage.

        Units without parameters belong to one call: they compute what every stage needs, such as masks.
        """
        allocated = {
            unit.path: unit_params
            for unit, unit_params in zip(stage_shard.units, stage_shard.unit_parameters, strict=True)
            if unit.parameters
        }
        units = [unit for unit in blueprint.units if unit.stage == stage_shard.index]
        return [
            allocated[unit.path]
            if _used(blueprint, unit)
            else UnitParameters(
                {short: self._buffer(blueprint, name) for short, name in unit.buffers.items()}, [], path=unit.path
            )
            for unit in units
        ]

    def _buffer(self, blueprint: Blueprint, name: str) -> tuple[nn.Module, str]:
        """The module and attribute of a buffer: the model's own, or a new one where the first call did not use it on this
        rank."""
        path, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            module = nn.Module()
        if getattr(module, leaf, None) is None:
            module = nn.Module()
            module.register_buffer(leaf, blueprint.buffers[name].to(self.device), persistent=False)
        return module, leaf

    def pipeline(self, blueprint: Blueprint, stages: list[Stage]) -> Pipeline:
        axis, count, schedule = self.axes["pp"], len(blueprint.sources), SCHEDULES[blueprint.schedule]
        placement = {stage: schedule.rank_of(stage, axis.size) for stage in range(count)}
        model_stages = [
            ModelStage(stage_shard, code, count, placement, blueprint.zero, axis.group, self.device)
            for stage_shard, code in zip(self.stage_shards, stages, strict=True)
        ]
        return Pipeline(model_stages, schedule.name, axis.size)

    def partials(self, blueprint: Blueprint) -> tuple[Partial, ...]:
        """The parameters of this rank whose gradients a call leaves partial. A 0-d parameter, which FSDP does not take, has a
        partial gradient on dp."""
        for stage_shard in self.stage_shards:
            reshard(stage_shard)
        partials = []
        for name, plan in blueprint.parameters.items():
            copies = tuple(self.model.get_parameter(s.names[name]) for s in self.stage_shards if name in s.names)
            if copies and plan.requires_grad:
                axes = [self.axes[axis] for axis in (*plan.partial_gradient, *(() if plan.shape else ("dp",)))]
                partials.append(Partial(name, copies, (*axes, *self._tie(name))))
        return tuple(partial for partial in partials if partial.is_summed)

    def _tie(self, name: str) -> list[Axis]:
        """The axis of the pipeline ranks that have a tied parameter, where there are several."""
        schedule, pipeline = SCHEDULES[self.blueprint.schedule], self.axes["pp"].size
        ranks = tuple(sorted({schedule.rank_of(stage, pipeline) for stage in self._users.get(name, [])}))
        return [self.tied[ranks]] if ranks in self.tied else []


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _used(blueprint: Blueprint, unit: UnitPlan) -> list[str]:
    return [name for name in unit.parameters.values() if not blueprint.parameters[name].idle]


def _not_allocated(first: Blueprint, other: Blueprint) -> str | None:
    """Why another call cannot use the parameters that were allocated for the first; None where it can."""
    allocated = {unit.path: set(unit.parameters.values()) for unit in first.units}
    for unit in other.units:
        for name in _used(other, unit):
            there, here = other.parameters[name], first.parameters[name]
            if name not in allocated.get(unit.path, ()):
                return f"uses {name} in {unit.path}, a unit that does not have it: the model was allocated"
            if (there.split, there.copies) != (here.split, here.copies):
                return f"needs {name} in {unit.path} as {there.layout}: it is {here.layout}, as the model was allocated"
    return None
