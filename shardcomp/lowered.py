"""What `lower()` returns: the Program after every pass, its listings and reports, and the blueprint for the runtime."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shardcomp import pass_runner
from shardcomp.capture import Exports
from shardcomp.capture.input_bounds import index_bounds, label_inputs
from shardcomp.cost.communication import stages_of
from shardcomp.errors import PlanError
from shardcomp.inspect.diff import diff
from shardcomp.inspect.report import Report, report
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.nodes import path_of
from shardcomp.ir.printer import sources
from shardcomp.ir.program import BUFFER, LAYER, PARAMETER, Program, Signature, Unit
from shardcomp.policy import Policy
from shardcomp.runtime.blueprint import Blueprint, ParameterPlan, UnitPlan
from shardcomp.runtime.call_cache import CallSignature, Trained


@dataclass
class Lowered:
    """A model lowered for one call signature: every stage of the way, and what the runtime needs."""

    model: nn.Module
    policy: Policy
    mesh: Mesh
    records: list[pass_runner.Record]
    seq: int
    micro_batch: int
    global_batch: int
    _exports: Exports = field(default_factory=dict, repr=False)
    _others: dict[tuple[Signature, tuple[int, int] | None, Trained], Blueprint] = field(default_factory=dict, repr=False)
    _lower: Callable[..., Lowered] = field(kw_only=True, repr=False)
    """`lowering.lower`, for the model's other calls."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def program(self) -> Program:
        return self.records[-1].program

    def report(self, rank: int = 0) -> Report:
        """What one rank has, computes and sends in one optimizer step, with the keys of `shardcomp inspect --json`."""
        return report(self, rank)

    def listing(self, after: str | None = None, rank: int = 0) -> str:
        """The Program as Python, at the end or after the pass named `after`; of a pipeline, the stages of `rank`. Every rank of
        tensor parallelism runs the same code."""
        if not 0 <= rank < self.mesh.world_size:
            raise PlanError(f"rank {rank}: the world has the ranks 0 to {self.mesh.world_size - 1}")
        record = self.record(after or self.records[-1].name)
        if record.program.stages == 1:
            return record.listing()
        texts = sources(record.program)
        stages = self.stages_of(rank)
        return "\n\n".join(f"# stage {stage}\n{texts[stage]}" if len(stages) > 1 else texts[stage] for stage in stages)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank runs."""
        return stages_of(self.program, self.policy.options.schedule, self.mesh.coordinates(rank))

    def diff(self, after: str) -> str:
        """What a pass changed, as a unified diff of the listings before and after it."""
        record = self.record(after)
        index = self.records.index(record)
        before = self.records[max(index - 1, 0)]
        return diff(before.listing(), record.listing(), before.name, record.name)

    def record(self, name: str) -> pass_runner.Record:
        name = pass_runner.current_name(name)
        for record in self.records:
            if record.name == name:
                return record
        raise PlanError(f"no pass is named {name!r}; there are {', '.join(record.name for record in self.records)}")

    def blueprint(self) -> Blueprint:
        """What the runtime needs, and nothing of the compiler."""
        program = self.program
        output_split = {}
        for key, name in program.outputs.items():
            output = program.values[name]
            placement = output.layout.on("tp")
            if placement.dim is not None:
                output_split[key] = (placement.dim, int(output.shape[placement.dim]))
        kind = program.output_type
        return Blueprint(
            name=program.name,
            sources=tuple(program.source.values()),
            mesh=program.mesh,
            precision=self.policy.options.precision,
            inputs=tuple(name for name, _ in program.signature.inputs),
            token_inputs=program.tokens.inputs if program.tokens else (),
            outputs=program.signature.outputs,
            units=tuple(_unit_plan(unit) for unit in program.units),
            parameters={name: _parameter_plan(p) for name, p in program.parameters.items()},
            buffers={name: b.value for name, b in program.buffers.items()},
            persistent_buffers=tuple(name for name, b in program.buffers.items() if b.persistent),
            training=program.signature.training,
            sequence_multiple=self.mesh.tp if self.policy.options.sequence_parallel else 1,
            static_shape=program.static_shape,
            micro_batch=self.policy.options.micro_batch,
            output_split=output_split,
            output_type=f"{kind.__module__}:{kind.__qualname__}",
            seed=self.policy.options.seed,
            ignored_label=_ignored_label(program),
            schedule=self.policy.options.schedule,
            compile=self.policy.options.compile,
            zero=self.policy.options.zero,
            offload=self.policy.options.offload != "none",
            policy=self.policy.replace(data=self.mesh.dp).as_dict(),
            index_bounds=index_bounds(self.record("canonicalize").program),
            label_inputs=label_inputs(self.record("canonicalize").program),
            positional=_positional(self.model),
            compare_ranks=self.policy.options.compare_ranks,
        )

    def for_call(self, call: CallSignature, shape: tuple[int, int], trained: Trained = None) -> Blueprint:
        """The blueprint of the same model and plan for another call, of (batch, length) = `shape`; lowered once, whoever
        asks.

        trained: the parameters, by this program's names, that have requires_grad now; by default the model's own.
        """
        signature = Signature(*call)
        with self._lock:
            for exported in (None, shape):
                if (signature, exported, trained) in self._others:
                    return self._others[signature, exported, trained]
            if signature == self.program.signature and self.program.static_shape in (None, shape) and trained is None:
                return self.blueprint()
            step = (self.seq, self.micro_batch, self.global_batch)
            lowered = self._lower(
                self.model,
                self._pinned(),
                self.mesh.world_size,
                *step,
                signature,
                shape,
                self._exports,
                None if trained is None else self._dense_names(trained),
            )
            again = lowered.blueprint()
            self._others[signature, again.static_shape, trained] = again
            return again

    def _dense_names(self, names: Iterable[str]) -> frozenset[str]:
        """The names in the model of parameters that may be parts of packed ones."""
        parts = {name: p.part for name, p in self.program.parameters.items()}
        return frozenset(part.of if (part := parts[name]) else name for name in names)

    def _pinned(self) -> Policy:
        """The policy with the layers of each stage as they were decided: every call of a model has the same stages."""
        if self.program.stages == 1:
            return self.policy
        units = (self.program.in_stages((stage,)) for stage in range(self.program.stages))
        return self.policy.replace(stage_layers=tuple(sum(unit.kind == LAYER for unit in stage_units) for stage_units in units))

    def save_source(self, directory: str | Path) -> None:
        """Write the emitted source and the table of parameters; `shardcomp.runtime` loads and trains them without the
        compiler."""
        self.blueprint().save(directory)


def _positional(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that the model's call takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)


def _ignored_label(program: Program) -> int:
    """The label of a token that does not count: what the body that counts the others compares with."""
    if program.tokens is None:
        return -100
    [total] = program.tokens.body.results
    differs: Any = total.args[0]
    return int(differs.args[1])


def _unit_plan(unit: Unit) -> UnitPlan:
    return UnitPlan(unit.path, _names(unit, PARAMETER), _names(unit, BUFFER), **asdict(unit.plan))


def _names(unit: Unit, role: str) -> dict[str, str]:
    """The name in the emitted code -> the name in the model."""
    names = unit.parameters if role == PARAMETER else unit.buffers
    return {path_of(node): name for node, name in zip(unit.body.placeholders(role), names, strict=True)}


def _parameter_plan(p: Any) -> ParameterPlan:
    dims = {axis: placement.dim for axis, placement in p.layout.placements}
    copies = p.layout.on("tp").copies
    return ParameterPlan(tuple(p.shape), p.requires_grad, dims, p.partial_gradient, p.aliases, p.part, copies, p.idle)
