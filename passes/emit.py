"""Write the Program as Python source, the code that will run.

Needs: layouts. Every line is what the listing shows; the runtime loads the file, and so can anyone.
Legality: nothing is rewritten.
"""

from __future__ import annotations

from dataclasses import replace

from shardcomp.inspect.listing import source
from shardcomp.program import Context, Contract, Program

CONTRACT = Contract(requires=frozenset({"canonical", "units", "layouts"}), provides=frozenset({"source"}))


def run(program: Program, context: Context) -> Program:
    return replace(program, source={"model.py": source(program)})
