"""Every kind of model under tensor parallelism: `python benchmarks/measure/families.py`, with `--help` for what else it takes.

For each a small model is sharded and compared with the dense one in float64. A line says whether they are equal, what a layer
sends, how much of the model is really split, and what the report lists as slower than it could be.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import shardcomp
from shardcomp import Policy, ShardError
from shardcomp.lowering import Lowered
from shardcomp.policy.options import add_option_flags, options_from
from support.families import families, tiny_config

COLUMNS = ("model", "equal", "deviation", "faults", "forward", "backward", "split", "not split", "degraded")


@dataclass
class Row:
    """What was found of one kind of model; `texts` are the columns, but for the model's name."""

    kind: str
    ok: bool
    texts: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def measure(kind: str, policy: str, options: dict[str, Any], mutate: bool) -> Row:
    """Lower, verify and count one kind of model."""
    torch.set_num_threads(1)
    try:
        config = tiny_config(kind)
        chosen = Policy.load("auto", **options) if policy == "auto" else Policy.for_model(config.model_type, **options)
        lowered = shardcomp.lower(config, chosen, seq=16)
        found = shardcomp.verify(config, chosen, shrink={"none": True}, kinds=("causal", "padded"), mutate=mutate)
    except ShardError as error:
        return Row(kind, False, notes=[f"{type(error).__name__}: {error}"])
    except Exception:
        return Row(kind, False, notes=[traceback.format_exc()])
    faults = f"{found.mutants['killed']} of {found.mutants['total']}" if found.mutants else ""
    whole = unsplit(lowered)
    degraded = [f"{each.what}: {each.why}" for each in lowered.program.degraded]
    texts = (
        "yes" if found.ok else "NO",
        f"{max(found.deviation.values()):.1e}",
        faults,
        sent(lowered, "forward"),
        sent(lowered, "backward"),
        f"{1 - sum(whole.values()) / sum(math.prod(p.shape) for p in lowered.program.parameters.values()):.1%}",
        str(len(whole)),
        str(len(degraded)),
    )
    notes = degraded if found.ok else [f"worst: {found.worst}", *degraded]
    return Row(kind, found.ok, texts, notes + [f"survived: {each}" for each in found.mutants.get("survivors", [])])


def unsplit(lowered: Lowered) -> dict[str, int]:
    """The parameters that every rank holds whole, and their sizes."""
    program = lowered.program
    return {name: math.prod(p.shape) for name, p in program.parameters.items() if p.layout.on("tp").dim is None}


def sent(lowered: Lowered, phase: str) -> str:
    """What the last layer of rank 0 sends over tp in one pass of a micro-batch, such as `2 all_gather + 2 reduce_scatter`."""
    layers = [unit.path for unit in lowered.program.in_stages((0,)) if unit.kind == "layer"]
    counts: dict[str, int] = {}
    for each in lowered.report()["collectives"]:
        if (each["where"], each["phase"], each["axis"]) == (layers[-1], phase, "tp"):
            counts[each["op"]] = counts.get(each["op"], 0) + each["count"]
    return " + ".join(f"{count} {op}" for op, count in sorted(counts.items())) or "none"


def main() -> int:
    """Returns the exit status: 1 where a model is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="kinds of model, as in tests/support/families.py (default: all)")
    parser.add_argument("--policy", choices=("auto", "shipped"), default="auto")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--sequence-parallel", choices=("true", "false"), default="true")
    parser.add_argument("--mutate", action="store_true", help="plant every fault, too")
    parser.add_argument("--plan", default="", help='further options of the plan, such as "--pipeline 2 --data 2 --zero 3"')
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    asked = parser.parse_args()
    options = {"tensor": asked.tensor, "sequence_parallel": asked.sequence_parallel == "true", "precision": "fp64"}
    flags = argparse.ArgumentParser(prog="--plan", add_help=False)
    add_option_flags(flags)
    options |= options_from(flags.parse_args(shlex.split(asked.plan)))
    kinds = asked.kinds or families()
    table = Table(*COLUMNS, box=None)
    rows = []
    with ProcessPoolExecutor(asked.jobs) as pool:
        tasks = [pool.submit(measure, kind, asked.policy, options, asked.mutate) for kind in kinds]
        for task in tasks:
            row = task.result()
            rows.append(row)
            print(f"{len(rows)}/{len(kinds)} {row.kind}: {'ok' if row.ok else 'FAILED'}", file=sys.stderr)
    for row in rows:
        table.add_row(row.kind, *(row.texts or ("FAILED",)))
    console = Console(width=150)
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.kind}: {note}", markup=False, highlight=False)
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
