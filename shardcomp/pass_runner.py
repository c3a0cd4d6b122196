"""Runs a list of passes: checks their contracts before anything runs and the Program after each, records, times and dumps.

Passes are silent; what is observed of them is observed here. SHARDCOMP_PRINT_AFTER=tensor_parallel (or all) prints listings to
stderr, SHARDCOMP_DUMP=directory writes numbered listings and their diffs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from shardcomp.errors import InternalError, PlanError
from shardcomp.inspect.diff import diff
from shardcomp.ir.printer import source
from shardcomp.ir.program import Context, Program
from shardcomp.ir.well_formed import check_program, used_parameters


@dataclass(frozen=True)
class Record:
    """A Program as it was after a pass, and the seconds the pass took."""

    name: str
    program: Program
    seconds: float

    def listing(self) -> str:
        return source(self.program)


FORMER_NAMES = {
    "unpack": "split_packed_weights",
    "units": "partition_units",
    "substitute": "fuse_kernels",
    "tensor": "tensor_parallel",
}
"""Names that passes had in earlier releases, still taken wherever a pass is named."""


def current_name(name: str) -> str:
    """The name of a pass today, given that or an earlier one."""
    return FORMER_NAMES.get(name, name)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def check_order(passes: Sequence[ModuleType]) -> None:
    """Raise PlanError where a pass needs what none before it provides."""
    provided: set[str] = set()
    for module in passes:
        if missing := module.CONTRACT.requires - provided:
            raise PlanError(f"the pass {name_of(module)} needs {', '.join(sorted(missing))}, which no pass before it provides")
        provided |= module.CONTRACT.provides


def run(program: Program, context: Context, passes: Sequence[ModuleType]) -> list[Record]:
    """Run the passes in order. Returns a record of the captured Program and one per pass."""
    check_order(passes)
    records = [Record("capture", program, 0.0)]
    provided: set[str] = set()
    _observe(records)
    for module in passes:
        began = time.perf_counter()
        program = module.run(program, context)
        records.append(Record(name_of(module), program, time.perf_counter() - began))
        provided |= module.CONTRACT.provides
        check_program(program, provided, name_of(module))
        if len(records) > 2 and (lost := used_parameters(records[-2].program) - used_parameters(program)):
            raise InternalError(f"after the pass {name_of(module)}: no unit uses {', '.join(sorted(lost)[:8])} any more")
        _observe(records)
    return records


def _observe(records: list[Record]) -> None:
    latest = records[-1]
    wanted = os.environ.get("SHARDCOMP_PRINT_AFTER", "")
    if wanted == "all" or latest.name in map(current_name, wanted.split(",")):
        print(f"# after {latest.name} ({latest.seconds:.2f} s)\n{latest.listing()}", file=sys.stderr)
    folder = os.environ.get("SHARDCOMP_DUMP")
    if folder:
        at = Path(folder)
        at.mkdir(parents=True, exist_ok=True)
        stem = f"{len(records) - 1:02d}_{latest.name}"
        (at / f"{stem}.py").write_text(latest.listing())
        if len(records) > 1:
            (at / f"{stem}.diff").write_text(diff(records[-2].listing(), latest.listing(), records[-2].name, latest.name))
