"""Shard a small model of every kind, and compare it with the dense one in float64.

    PYTHONPATH=.:tests python benchmarks/measure/families.py
    PYTHONPATH=.:tests python benchmarks/measure/families.py --plan "--pipeline 2 --data 2 --zero 3" llama gpt2

A line says whether the two agree, what a layer sends over tp, how much of the model is split, and how much the report lists as
degraded.
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
from shardcomp.lowered import Lowered
from shardcomp.policy.options import add_option_flags, options_from
from support.families import families, tiny_config

COLUMNS = ("model", "equal", "deviation", "mutants", "forward", "backward", "split", "replicated", "degraded")


@dataclass
class Row:
    """The result for one kind of model. `texts` has the columns without the first, the model's name."""

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
        answer = shardcomp.verify(config, chosen, shrink={"none": True}, kinds=("causal", "padded"), mutate=mutate)
    except ShardError as error:
        return Row(kind, False, notes=[f"{type(error).__name__}: {error}"])
    except Exception:
        return Row(kind, False, notes=[traceback.format_exc()])
    mutants = f"{answer.mutants['killed']} of {answer.mutants['total']}" if answer.mutants else ""
    replicated = replicated_sizes(lowered)
    degraded = [f"{entry.what}: {entry.why}" for entry in lowered.program.degraded]
    texts = (
        "yes" if answer.ok else "NO",
        f"{max(answer.deviation.values()):.1e}",
        mutants,
        sent(lowered, "forward"),
        sent(lowered, "backward"),
        f"{1 - sum(replicated.values()) / sum(math.prod(p.shape) for p in lowered.program.parameters.values()):.1%}",
        str(len(replicated)),
        str(len(degraded)),
    )
    notes = degraded if answer.ok else [f"worst: {answer.worst}", *degraded]
    notes += [f"survived: {mutant}" for mutant in answer.mutants.get("survivors", [])]
    return Row(kind, answer.ok, texts, notes)


def replicated_sizes(lowered: Lowered) -> dict[str, int]:
    """The parameters that are replicated over tp, and their sizes."""
    program = lowered.program
    return {name: math.prod(p.shape) for name, p in program.parameters.items() if p.layout.on("tp").dim is None}


def sent(lowered: Lowered, phase: str) -> str:
    """What the last layer of rank 0 sends over tp in one pass of a micro-batch, such as `2 all_gather + 2 reduce_scatter`."""
    layers = [unit.path for unit in lowered.program.in_stages((0,)) if unit.kind == "layer"]
    counts: dict[str, int] = {}
    for entry in lowered.report()["collectives"]:
        if (entry["where"], entry["phase"], entry["axis"]) == (layers[-1], phase, "tp"):
            counts[entry["op"]] = counts.get(entry["op"], 0) + entry["count"]
    return " + ".join(f"{count} {op}" for op, count in sorted(counts.items())) or "none"


def main() -> int:
    """Run the command. Returns its exit status: 1 if a model does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="kinds of model, as in tests/support/families.py (default: all)")
    parser.add_argument("--policy", choices=("auto", "shipped"), default="auto")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--sequence-parallel", choices=("true", "false"), default="true")
    parser.add_argument("--mutate", action="store_true", help="run every mutant, too")
    parser.add_argument("--plan", default="", help='further options of the plan, such as "--pipeline 2 --data 2 --zero 3"')
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time")
    args = parser.parse_args()
    options = {"tensor": args.tensor, "sequence_parallel": args.sequence_parallel == "true", "precision": "fp64"}
    flags = argparse.ArgumentParser(prog="--plan", add_help=False)
    add_option_flags(flags)
    options |= options_from(flags.parse_args(shlex.split(args.plan)))
    kinds = args.kinds or families()
    table = Table(*COLUMNS, box=None)
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(measure, kind, args.policy, options, args.mutate) for kind in kinds]
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
