"""What is true of every Program, and of one after each pass: defined values, legal layouts, stages in order."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shardcomp.errors import InternalError
from shardcomp.ir.layout import divides
from shardcomp.ir.nodes import values
from shardcomp.ir.program import INPUT, PARAMETER, Program


def check_program(program: Program, provided: set[str], after: str) -> None:
    """Raise InternalError where the Program breaks a promise: of every Program, or of what `provided` names."""
    violations = [*_graph_violations(program), *_wiring_violations(program)]
    if "layouts" in provided:
        violations += _layout_violations(program)
    if "stages" in provided:
        violations += _stage_violations(program)
    if violations:
        raise InternalError(f"after the pass {after}: " + "; ".join(violations[:8]))


def used_parameters(program: Program) -> set[str]:
    """The parameters that some unit uses, parts under the name of what they are part of. Once dead code is gone, no pass may
    lose one."""
    names = {program.resolve(name) for unit in program.units for name in unit.parameters}
    # `split_packed_weights` replaces a packed weight by its slices, and so it must count as used still.
    parts = {name: program.parameters[name].part for name in names if name in program.parameters}
    return {part.of if (part := parts.get(name)) else name for name in names}


def _graph_violations(program: Program) -> Iterable[str]:
    for body in program.bodies():
        try:
            body.graph.lint()
        except (RuntimeError, AssertionError) as error:
            yield f"{body.name}: {error}"
        for node in body.graph.nodes:
            if node.op != "output" and "value" not in node.meta:
                yield f"{body.name}: nothing is known of {node}"


def _wiring_violations(program: Program) -> Iterable[str]:
    # Units run in order: a value is defined only once a unit before has made it.
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
    yield from (f"a unit uses {name}, which is not a parameter of the program" for name in used - set(program.parameters))


def _layout_violations(program: Program) -> Iterable[str]:
    sizes = program.mesh.as_dict()
    for unit in program.units:
        results = dict(zip(unit.outputs, unit.body.results, strict=True))
        for name, node in results.items():
            # Units are legal by themselves: a reader takes what it gets for complete.
            if any(value.layout.partial_axes() for value in values(node)):
                yield f"{unit.path} gives {name} as a partial value"
        for name, node in zip(unit.inputs, unit.body.placeholders(INPUT), strict=True):
            read, layout = values(node)[0].layout, program.values[name].layout if name in program.values else None
            # A body is written for one layout of each input, and units with other layouts need another body.
            if layout not in (None, read):
                yield f"{unit.path} takes {name} as {read}, but its layout is {layout}"
    for body in program.bodies():
        for node in body.graph.nodes:
            if node.op != "call_function":
                continue
            for value in values(node):
                for axis, placement in value.layout.placements:
                    if placement.dim is not None and placement.dim >= len(value.shape):
                        yield f"{body.name}: {node} is split on dimension {placement.dim}, which it does not have"
                    elif placement.dim is not None and not divides(value.shape[placement.dim], sizes[axis] // placement.copies):
                        yield from _uneven_violations(body.name, node, program)


def _stage_violations(program: Program) -> Iterable[str]:
    before = 0
    for unit in program.units:
        # Each stage sends to the next one only, so none may be skipped and none comes back.
        if not before <= unit.plan.stage <= before + 1:
            yield f"{unit.path} is in stage {unit.plan.stage}, after a unit of stage {before}"
        before = unit.plan.stage
    # Every pipeline rank runs the same number of stages.
    if (before + 1) % program.mesh.pp:
        yield f"{before + 1} stages do not go round {program.mesh.pp} ranks"


def _uneven_violations(where: str, node: torch.fx.Node, program: Program) -> Iterable[str]:
    """A dimension that does not divide may only come from a weight that is split so."""
    uneven = {p.shape[pl.dim] for p in program.parameters.values() for _, pl in p.layout.placements if pl.dim is not None}
    for value in values(node):
        for _, placement in value.layout.placements:
            if placement.dim is not None and value.shape[placement.dim] not in uneven:
                yield f"{where}: {node} is split unevenly on dimension {placement.dim} of {value.shape}"
