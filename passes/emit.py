"""Write the Program as Python source, one file for each stage: the code that runs.

Every line is in the listing. The runtime loads the file, and so can anyone.

Legality: nothing is rewritten.
"""

from __future__ import annotations

from dataclasses import replace

from shardcomp.ir.printer import sources
from shardcomp.ir.program import Context, Contract, Program, source_files

CONTRACT = Contract(requires=frozenset({"canonical", "units", "layouts", "stages"}), provides=frozenset({"source"}))


def run(program: Program, context: Context) -> Program:
    written = sources(program)
    return replace(program, source=dict(zip(source_files(len(written)), written, strict=True)))
