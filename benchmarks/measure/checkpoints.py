"""Two tables about checkpoints: `PYTHONPATH=.:tests python benchmarks/measure/checkpoints.py`, with `--help` for what it takes.

Topologies: a run that goes through five, and drawn pairs of them, in float64 beside a run on one rank that nothing interrupts.
Corruption: drawn damage of every kind in every file, and how often it was loaded all the same.
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
    return " ".join(f"{key} {held}" for key, held in options.items()) or "one rank"


def row(name: str, leg: Leg, whole: Leg) -> tuple[list[str], bool]:
    """A run's steps, whether its batches are those of the uninterrupted run, and how far its losses and weights are."""
    first = leg.restored.step if leg.restored else 0
    exact = whole.losses[first : first + len(leg.losses)]
    batches = leg.digests == whole.digests[first : first + len(leg.digests)]
    losses = max(abs(a - b) / abs(b) for a, b in zip(leg.losses, exact, strict=True))
    weights = max(float((held - whole.weights[n]).norm() / whole.weights[n].norm()) for n, held in leg.weights.items())
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


def corruptions(count: int, seed: int, folder: Path) -> tuple[Table, bool]:
    """Each kind of damage in each file: how often it was done, refused with the checkpoint's name, and loaded in silence."""
    run = folder / "run"
    train(corruption.LOWERED, 1, save=run / directory.name_of(1))
    train(corruption.LOWERED, 2, load=run, save=run / directory.name_of(2))
    draw = random.Random(seed)
    done: Counter[tuple[str, str]] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    while done.total() < count:
        shutil.copytree(run, folder / "copy")
        path = folder / "copy" / directory.name_of(2)
        victim, way = draw.choice(corruption.files(path)), draw.choice(corruption.WAYS)
        before = {each.name: each.read_bytes() for each in corruption.files(path)}
        way(victim, draw)
        if {each.name: each.read_bytes() for each in corruption.files(path)} != before:
            said = corruption.attempt(folder / "copy")
            kind = (way.__name__, "rank-*.safetensors" if victim.suffix == ".safetensors" else victim.name)
            done[kind] += 1
            silent[kind] += said is None or str(path) not in said
        shutil.rmtree(folder / "copy")
    table = Table("damage", "file", "times", "refused by name", "loaded in silence")
    for kind in sorted(done):
        table.add_row(*kind, str(done[kind]), str(done[kind] - silent[kind]), str(silent[kind]))
    table.add_row("all", "", str(done.total()), str(done.total() - silent.total()), str(silent.total()))
    return table, not any(silent.values())


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    console, fine = Console(), True
    for measure, count in ((corruptions, asked.corruptions), (topologies, asked.pairs)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                table, ok = measure(count, asked.seed, Path(folder))
            console.print(table)
            fine = fine and ok
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
