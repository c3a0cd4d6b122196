"""Two tables about checkpoints.

    PYTHONPATH=.:tests python benchmarks/measure/checkpoints.py [--pairs 20] [--corruptions 200] [--seed 0]

Topologies: a run that is resumed on five topologies, and runs on random pairs of them, in float64 beside an uninterrupted run
on one rank. Corruption: random damage of every kind in every file, and how often it was loaded in silence.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoint import test_corruption as corruption
from checkpoint.legs import Leg, train
from checkpoint.test_topologies import CHAIN, PLANS, lowered, uninterrupted
from rich.console import Console
from rich.table import Table

from shardcomp.checkpoint import directory


def words(options: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in options.items()) or "one rank"


def row(name: str, leg: Leg, whole: Leg) -> tuple[list[str], bool]:
    """A row of the table: whether a run has the batches of the uninterrupted one, and how far its losses and weights are."""
    first = leg.restored.step if leg.restored else 0
    exact = whole.losses[first : first + len(leg.losses)]
    batches = leg.digests == whole.digests[first : first + len(leg.digests)]
    losses = max(abs(a - b) / abs(b) for a, b in zip(leg.losses, exact, strict=True))
    weights = max(float((weight - whole.weights[n]).norm() / whole.weights[n].norm()) for n, weight in leg.weights.items())
    ok = batches and losses <= 1e-9 and weights <= 1e-9
    return [name, "yes" if batches else "NO", f"{losses:.1e}", f"{weights:.1e}", "yes" if ok else "NO"], ok


def topologies(pairs: int, seed: int, folder: Path) -> tuple[Table, bool]:
    """The chain, then drawn pairs."""
    table = Table("topology", "same batches", "losses", "weights", "within 1e-9")
    fine, load = True, None
    for number, options in enumerate(CHAIN):
        steps = 2 * (number + 1)
        save = folder / f"chain-{number}"
        leg = train(lowered(True, number), steps, load=load, save=save)
        cells, ok = row(f"{'→ ' if number else ''}{words(options)}", leg, uninterrupted(True, steps))
        table.add_row(*cells)
        fine, load = fine and ok, save
    table.add_section()
    draw = random.Random(seed)
    for before, after in draw.sample([(a, b) for a in range(len(PLANS)) for b in range(len(PLANS)) if a != b], pairs):
        tied = draw.random() < 0.5
        save = folder / f"{before}-{after}"
        train(lowered(tied, before), 2, save=save)
        leg = train(lowered(tied, after), 4, load=save)
        cells, ok = row(f"{words(PLANS[before])} → {words(PLANS[after])}", leg, uninterrupted(tied, 4))
        table.add_row(*cells)
        fine = fine and ok
        print(cells[0], file=sys.stderr, flush=True)
    return table, fine


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in corruption.files(checkpoint)}


def corruptions(count: int, seed: int, folder: Path) -> tuple[Table, bool]:
    """Kinds of damage by file: how often each was tried, refused with the checkpoint's name, and loaded in silence."""
    run = folder / "run"
    train(corruption.LOWERED, 1, save=run / directory.name_of(1))
    train(corruption.LOWERED, 2, load=run, save=run / directory.name_of(2))
    draw = random.Random(seed)
    tried: Counter[tuple[str, str]] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    while tried.total() < count:
        shutil.copytree(run, folder / "copy")
        path = folder / "copy" / directory.name_of(2)
        victim, way = draw.choice(corruption.files(path)), draw.choice(corruption.WAYS)
        before = contents(path)
        way(victim, draw)
        if contents(path) != before:
            said = corruption.attempt(folder / "copy")
            kind = (way.__name__, "rank-*.safetensors" if victim.suffix == ".safetensors" else victim.name)
            tried[kind] += 1
            silent[kind] += said is None or str(path) not in said
        shutil.rmtree(folder / "copy")
    table = Table("damage", "file", "times", "refused by name", "loaded in silence")
    for kind in sorted(tried):
        table.add_row(*kind, str(tried[kind]), str(tried[kind] - silent[kind]), str(silent[kind]))
    table.add_row("all", "", str(tried.total()), str(tried.total() - silent.total()), str(silent.total()))
    return table, not any(silent.values())


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console, fine = Console(), True
    for measure, count in ((corruptions, args.corruptions), (topologies, args.pairs)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                table, ok = measure(count, args.seed, Path(folder))
            console.print(table)
            fine = fine and ok
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
