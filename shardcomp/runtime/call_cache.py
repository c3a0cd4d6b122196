"""The code that a rank runs for each call of a model: emitted Python bound to the parameters that were allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.allocation import StageShard, users
from shardcomp.runtime.blueprint import Blueprint, UnitPlan
from shardcomp.runtime.fsdp import reshard
from shardcomp.runtime.gradients import Partial
from shardcomp.runtime.random import Streams
from shardcomp.runtime.stage import ModelStage, Pipeline
from shardcomp.runtime.unit import Stage, UnitParameters

CallSignature = tuple[tuple[tuple[str, int], ...], tuple[str, ...], bool | None]
"""A call signature: the inputs given as (name, dimensions), the outputs wanted, and the mode: training or not, or None where
each module is in a mode of its own."""
Trained = frozenset[str] | None
"""The names of the parameters that are trained; None for those that were when the model was sharded."""
Lower = Callable[[CallSignature, tuple[int, int], Trained], Blueprint]
"""Lowers a call of a given (batch, length), which matters only for models with static shapes."""


@dataclass(frozen=True, eq=False)
class LoadedCall:
    """The code of one call signature on this rank: its stages, and the parameters whose gradient it leaves partial."""

    blueprint: Blueprint
    stages: list[Stage]
    partials: tuple[Partial, ...]
    pipeline: Pipeline | None


class CallCache:
    """Every call that was made of a model, lowered when its signature, or for a model with static shapes its shape, is first
    met. All share the parameters that were allocated for the first, of `blueprint`.

    model: what has the parameters and buffers, by their names on this rank. unit_axes: those that units exchange along, a copy
    of `axes`, which everything else does. tied: the axis of the pipeline ranks that hold one weight, by these ranks. lower:
    None where there is only the source of one call.
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
        self.model, self.blueprint, self.chunks, self.tied = model, blueprint, stage_shards, tied
        self.axes, self.unit_axes, self.device, self.random, self.lower = axes, dict(axes), device, random, lower
        self.loaded: dict[tuple[CallSignature, tuple[int, int] | None, Trained], LoadedCall] = {}
        self.trained: Trained = None
        """What the calls that are made from now on train."""
        self._users = users(blueprint)

    def of(self, batch: Mapping[str, Tensor], outputs: tuple[str, ...], training: bool | None) -> LoadedCall:
        """The code for a call with these inputs. Raises PlanError for one that cannot be made of what was allocated."""
        call: CallSignature = (tuple(sorted((name, tensor.dim()) for name, tensor in batch.items())), outputs, training)
        rows, length = next(iter(batch.values())).shape[:2]
        for shape in (None, (rows, length)):
            if (call, shape, self.trained) in self.loaded:
                return self.loaded[call, shape, self.trained]
        blueprint = self._blueprint_for(call, (rows, length))
        stages = [
            blueprint.module(stage_shard.index).Model(
                self._homes(blueprint, stage_shard), self.unit_axes, self.device, self.random
            )
            for stage_shard in self.chunks
        ]
        if blueprint.compile:
            for unit in (unit for stage in stages for unit in stage.each):
                unit.compile()
        pipeline = self.pipeline(blueprint, stages) if blueprint.mesh.pp > 1 else None
        loaded = LoadedCall(blueprint, stages, self.partials(blueprint), pipeline)
        self.loaded[call, blueprint.static_shape, self.trained] = loaded
        return loaded

    def _blueprint_for(self, call: CallSignature, shape: tuple[int, int]) -> Blueprint:
        inputs, outputs, training = call
        mine = self.blueprint
        same = (tuple(sorted(mine.inputs)), mine.outputs, mine.training) == (tuple(n for n, _ in inputs), outputs, training)
        if same and mine.static_shape in (None, shape) and self.trained is None:
            return mine
        has = f"({', '.join(mine.inputs)}) -> ({', '.join(mine.outputs)}), training = {mine.training}"
        if self.lower is None and self.trained is not None:
            frozen = sorted(name for name in self.trained if not mine.parameters[name].requires_grad)
            raise PlanError(
                f"this source was written with {', '.join(frozen[:3])} frozen{_and_more(frozen)}: it has no sums of their "
                "gradients over ranks. Save the source of a model where they have requires_grad"
            )
        if self.lower is None:
            asked = f"({', '.join(name for name, _ in inputs)}) -> ({', '.join(outputs)}), training = {training}, shape {shape}"
            raise PlanError(f"this source was written for {has}, shape {mine.static_shape or 'any'}; the call is {asked}")
        again = self.lower(call, shape, self.trained)
        if problem := _not_held(mine, again):
            raise PlanError(f"the call ({', '.join(again.inputs)}) -> ({', '.join(outputs)}) {problem} for the call {has}")
        return again

    def _homes(self, blueprint: Blueprint, stage_shard: StageShard) -> list[UnitParameters]:
        """The homes of the units that a call has in a stage. Each call has units of its own that use no parameters: what it
        computes again in a stage, such as masks."""
        kept = {
            unit.path: home
            for unit, home in zip(stage_shard.units, stage_shard.unit_parameters, strict=True)
            if unit.parameters
        }
        units = [unit for unit in blueprint.units if unit.stage == stage_shard.index]
        return [
            kept[unit.path]
            if _used(blueprint, unit)
            else UnitParameters(
                {short: self._buffer(blueprint, name) for short, name in unit.buffers.items()}, [], path=unit.path
            )
            for unit in units
        ]

    def _buffer(self, blueprint: Blueprint, name: str) -> tuple[nn.Module, str]:
        """The module that has a buffer, and the attribute: one of the model, or one made here where this rank's stages have no
        use for it in the first call."""
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
        made = [
            ModelStage(stage_shard, code, count, placement, blueprint.zero, axis.group, self.device)
            for stage_shard, code in zip(self.chunks, stages, strict=True)
        ]
        return Pipeline(made, schedule.name, axis.size)

    def partials(self, blueprint: Blueprint) -> tuple[Partial, ...]:
        """The parameters of this rank whose gradients a call leaves partial. A parameter of no dimension, which FSDP does not
        take, is one of them on dp."""
        for stage_shard in self.chunks:
            reshard(stage_shard)
        partials = []
        for name, plan in blueprint.parameters.items():
            copies = tuple(self.model.get_parameter(c.names[name]) for c in self.chunks if name in c.names)
            if copies and plan.requires_grad:
                axes = [self.axes[axis] for axis in (*plan.partial_gradient, *(() if plan.shape else ("dp",)))]
                partials.append(Partial(name, copies, (*axes, *self._tie(name))))
        return tuple(partial for partial in partials if partial.is_summed)

    def _tie(self, name: str) -> list[Axis]:
        """The axis of the pipeline ranks that hold a parameter, where there are several."""
        schedule, pipeline = SCHEDULES[self.blueprint.schedule], self.axes["pp"].size
        ranks = tuple(sorted({schedule.rank_of(stage, pipeline) for stage in self._users.get(name, [])}))
        return [self.tied[ranks]] if ranks in self.tied else []


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _used(blueprint: Blueprint, unit: UnitPlan) -> list[str]:
    return [name for name in unit.parameters.values() if not blueprint.parameters[name].idle]


def _not_held(mine: Blueprint, other: Blueprint) -> str | None:
    """What another call needs of the parameters otherwise than the model was allocated."""
    held = {unit.path: set(unit.parameters.values()) for unit in mine.units}
    for unit in other.units:
        for name in _used(other, unit):
            there, here = other.parameters[name], mine.parameters[name]
            if name not in held.get(unit.path, ()):
                return f"uses {name} in {unit.path}, a unit that does not hold it: the model was allocated"
            if (there.split, there.copies) != (here.split, here.copies):
                return f"needs {name} in {unit.path} cut as {there.layout}: it is {here.layout}, as the model was allocated"
    return None
