"""Runs a list of passes: checks their contracts before anything runs, verifies the Program after each, records, times
and dumps.

Passes are silent; what is observed of them is observed here. SHARDCOMP_PRINT_AFTER=tensor (or all) prints listings to stderr,
SHARDCOMP_DUMP=directory writes numbered listings and their diffs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from shardcomp.errors import InternalError, PlanError
from shardcomp.inspect.diff import diff
from shardcomp.inspect.listing import source
from shardcomp.layout import divides
from shardcomp.program import INPUT, PARAMETER, Context, Program
from shardcomp.propagate import values


@dataclass(frozen=True)
class Record:
    """A Program as it was after a pass, and the seconds the pass took."""

    name: str
    program: Program
    seconds: float

    def listing(self) -> str:
        return source(self.program)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def check_order(passes: Sequence[ModuleType], disabled: Iterable[str] = ()) -> list[ModuleType]:
    """The passes that will run. Raises PlanError where one needs what none before it provides, or may not be disabled."""
    off = set(disabled)
    unknown = off - {name_of(p) for p in passes}
    if unknown:
        raise PlanError(f"no pass is named {', '.join(sorted(unknown))}; there are {', '.join(name_of(p) for p in passes)}")
    needed = [name_of(p) for p in passes if name_of(p) in off and not p.CONTRACT.optional]
    if needed:
        raise PlanError(f"the pass {', '.join(needed)} is not optional and cannot be disabled")
    holds: set[str] = set()
    chosen = [p for p in passes if name_of(p) not in off]
    for p in chosen:
        missing = p.CONTRACT.requires - holds
        if missing:
            raise PlanError(f"the pass {name_of(p)} needs {', '.join(sorted(missing))}, which no pass before it provides")
        holds |= p.CONTRACT.provides
    return chosen


def run(program: Program, context: Context, passes: Sequence[ModuleType], disabled: Iterable[str] = ()) -> list[Record]:
    """Run the passes in order. Returns a record of the captured Program and one per pass."""
    records = [Record("capture", program, 0.0)]
    holds: set[str] = set()
    _observe(records)
    for each in check_order(passes, disabled):
        began = time.perf_counter()
        program = each.run(program, context)
        records.append(Record(name_of(each), program, time.perf_counter() - began))
        holds |= each.CONTRACT.provides
        verify(program, holds, name_of(each))
        if len(records) > 2 and (lost := _used(records[-2].program) - _used(program)):
            raise InternalError(f"after the pass {name_of(each)}: no unit uses {', '.join(sorted(lost)[:8])} any more")
        _observe(records)
    return records


def _observe(records: list[Record]) -> None:
    latest = records[-1]
    wanted = os.environ.get("SHARDCOMP_PRINT_AFTER", "")
    if wanted == "all" or latest.name in wanted.split(","):
        print(f"# after {latest.name} ({latest.seconds:.2f} s)\n{latest.listing()}", file=sys.stderr)
    folder = os.environ.get("SHARDCOMP_DUMP")
    if folder:
        at = Path(folder)
        at.mkdir(parents=True, exist_ok=True)
        stem = f"{len(records) - 1:02d}_{latest.name}"
        (at / f"{stem}.py").write_text(latest.listing())
        if len(records) > 1:
            (at / f"{stem}.diff").write_text(diff(records[-2].listing(), latest.listing(), records[-2].name, latest.name))


def verify(program: Program, holds: set[str], after: str) -> None:
    """Raise InternalError where the Program breaks a promise: of every Program, or of what `holds` says is true by now."""
    faults = [*_graph_faults(program), *_wiring_faults(program)]
    if "layouts" in holds:
        faults += _layout_faults(program)
    if "stages" in holds:
        faults += _stage_faults(program)
    if faults:
        raise InternalError(f"after the pass {after}: " + "; ".join(faults[:8]))


def _used(program: Program) -> set[str]:
    """The parameters that some unit uses, parts under the name of what they are part of. Once dead code is gone, no pass may
    lose one."""
    names = {program.resolve(name) for unit in program.units for name in unit.parameters}
    parts = {name: program.parameters[name].part for name in names if name in program.parameters}
    return {part.of if (part := parts.get(name)) else name for name in names}


def _graph_faults(program: Program) -> Iterable[str]:
    for body in program.bodies():
        try:
            body.graph.lint()
        except (RuntimeError, AssertionError) as fault:
            yield f"{body.name}: {fault}"
        for node in body.graph.nodes:
            if node.op != "output" and "value" not in node.meta:
                yield f"{body.name}: nothing is known of {node}"


def _wiring_faults(program: Program) -> Iterable[str]:
    defined = set(program.inputs)
    used: set[str] = set()
    for unit in program.units:
        body = unit.body
        yield from (f"{unit.path} reads {name}, which nothing before it makes" for name in unit.inputs if name not in defined)
        if len(unit.inputs) != len(body.placeholders(INPUT)) or len(unit.parameters) != len(body.placeholders(PARAMETER)):
            yield f"{unit.path} is wired to other inputs or parameters than its body {body.name} has"
        defined |= set(unit.outputs)
        used |= {program.resolve(name) for name in unit.parameters}
    yield from (f"the result {name} is made by no unit" for name in program.outputs.values() if name not in defined)
    yield from (f"a unit uses {name}, which is no parameter of the program" for name in used - set(program.parameters))


def _layout_faults(program: Program) -> Iterable[str]:
    sizes = program.mesh.as_dict()
    for unit in program.units:
        held = dict(zip(unit.outputs, unit.body.results, strict=True))
        for name, node in held.items():
            if any(value.layout.partial_axes() for value in values(node)):
                yield f"{unit.path} gives {name} as a partial value"
        for name, node in zip(unit.inputs, unit.body.placeholders(INPUT), strict=True):
            if name in program.values and program.values[name].layout != values(node)[0].layout:
                yield f"{unit.path} takes {name} as {values(node)[0].layout}, but it lies as {program.values[name].layout}"
    for body in program.bodies():
        for node in body.graph.nodes:
            if node.op != "call_function":
                continue
            for value in values(node):
                for axis, placement in value.layout.placements:
                    if placement.dim is not None and placement.dim >= len(value.shape):
                        yield f"{body.name}: {node} is split on dimension {placement.dim}, which it does not have"
                    elif placement.dim is not None and not divides(value.shape[placement.dim], sizes[axis] // placement.copies):
                        yield from _uneven_faults(body.name, node, program)


def _stage_faults(program: Program) -> Iterable[str]:
    before = 0
    for unit in program.units:
        if not before <= unit.plan.stage <= before + 1:
            yield f"{unit.path} is in stage {unit.plan.stage}, behind a unit of stage {before}"
        before = unit.plan.stage
    if (before + 1) % program.mesh.pp:
        yield f"{before + 1} stages do not go round {program.mesh.pp} ranks"


def _uneven_faults(where: str, node: torch.fx.Node, program: Program) -> Iterable[str]:
    """A dimension that does not divide may only come from a weight that is cut so."""
    cut = {p.shape[pl.dim] for p in program.parameters.values() for _, pl in p.layout.placements if pl.dim is not None}
    for value in values(node):
        for _, placement in value.layout.placements:
            if placement.dim is not None and value.shape[placement.dim] not in cut:
                yield f"{where}: {node} is split unevenly on dimension {placement.dim} of {value.shape}"
