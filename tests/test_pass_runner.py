"""What the driver observes: records, printed and dumped listings, and promises that a pass breaks."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import shardcomp
from shardcomp import pass_runner
from shardcomp.errors import InternalError
from shardcomp.ir.layout import PARTIAL
from shardcomp.ir.nodes import value
from shardcomp.ir.program import Context, Program
from shardcomp.lowering import PASSES
from shardcomp.passes import tensor_parallel
from support.models import tiny


def lowered() -> shardcomp.lowering.Lowered:  # type: ignore[name-defined]
    return shardcomp.lower(tiny(), shardcomp.Policy.load("llama", tensor=2), seq=16)


def test_every_record_reads_as_python() -> None:
    found = lowered()
    assert [record.name for record in found.records] == ["capture", *(pass_runner.name_of(each) for each in PASSES)]
    for record in found.records:
        ast.parse(record.listing())
    assert "+        input_layernorm_gathered" in found.diff("tensor")


def test_listings_are_printed_and_dumped_where_the_environment_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDCOMP_PRINT_AFTER", "tensor")
    monkeypatch.setenv("SHARDCOMP_DUMP", str(tmp_path))
    found = lowered()
    printed = capsys.readouterr().err
    assert "# after tensor_parallel" in printed and "# after partition_units" not in printed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:3] == ["00_capture.py", "01_canonicalize.diff", "01_canonicalize.py"]
    assert (tmp_path / f"{len(PASSES):02d}_emit.py").read_text() == found.listing()


def broken(change: object) -> list[ModuleType]:
    """The passes up to `tensor`, and one after it that changes the Program."""
    module = ModuleType("shardcomp.passes.broken")
    module.CONTRACT = shardcomp.ir.program.Contract()  # type: ignore[attr-defined]
    module.run = change  # type: ignore[attr-defined]
    return [*PASSES[: PASSES.index(tensor_parallel) + 1], module]


def run(change: object) -> None:
    found = lowered()
    first: Program = found.records[0].program
    pass_runner.run(first, Context(found.mesh, found.policy), broken(change))


def test_a_partial_value_at_a_border_is_a_fault_of_the_pass() -> None:
    def change(program: Program, context: Context) -> Program:
        node = program.units[1].body.results[0]
        held = value(node)
        node.meta["value"] = type(held)(held.shape, held.dtype, held.requires_grad, held.layout.put("tp", PARTIAL))
        return program

    with pytest.raises(InternalError, match="partial value"):
        run(change)


def test_a_unit_that_reads_what_nothing_makes_is_a_fault_of_the_pass() -> None:
    def change(program: Program, context: Context) -> Program:
        program.units[1].inputs = ("nowhere", *program.units[1].inputs[1:])
        return program

    with pytest.raises(InternalError, match="reads nowhere"):
        run(change)


def test_a_split_over_a_dimension_that_does_not_exist_is_a_fault_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(program: Program, context: Context) -> Program:
        node = next(program.units[1].body.calls())
        held = value(node)
        node.meta["value"] = type(held)(
            held.shape, held.dtype, held.requires_grad, held.layout.put("tp", tensor_parallel.split(9))
        )
        return program

    with pytest.raises(InternalError, match="dimension 9"):
        run(change)


def test_a_parameter_that_no_unit_uses_any_more_is_a_fault_of_the_pass() -> None:
    def change(program: Program, context: Context) -> Program:
        unit = program.units[1]
        changed = replace(unit, parameters=(unit.parameters[1], *unit.parameters[1:]))
        return replace(program, units=[program.units[0], changed, *program.units[2:]])

    with pytest.raises(InternalError, match="any more"):
        run(change)
