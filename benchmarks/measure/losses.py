"""Train the tiny preset under a plan and on one rank with the same global batch, both in float32, and print their losses.

    python benchmarks/measure/losses.py
    python benchmarks/measure/losses.py --steps 50 --pipeline 4 --schedule zbv

Without options the plan is --tensor 2 --pipeline 2 --data 2 --zero 1 --schedule interleaved. The driver runs on the text of
`make pretrain`, with a process for every rank, under gloo. The exit status is 1 if a loss differs by more than 1e-5 of itself,
or if a step had other samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shardcomp
from shardcomp.policy.options import add_option_flags, flags, joined, options_from

ROOT = Path(__file__).parents[2]
PLAN = {"tensor": 2, "pipeline": 2, "data": 2, "zero": 1, "schedule": "interleaved"}
TRAIN = ["--config", "tiny", "--max-length", "256", "--warmup", "20", "--lr", "2e-3"]
SAMPLES = 8
"""Rows of each data-parallel rank."""
TOLERANCE = 1e-5


def run(steps: int, samples: int, options: dict[str, Any]) -> list[tuple[float, str]]:
    """The loss and the digest of the batch of each step."""
    ranks = shardcomp.Policy.load("llama", **options).options.ranks
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words += [str(ROOT / "examples/llama/pretrain.py"), *TRAIN, "--steps", str(steps), "--batch-size", str(samples)]
        words += [*flags(options), "--log-file", str(log)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
        entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [(entry["loss"], entry["digest"]) for entry in entries if "loss" in entry]


def main() -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    add_option_flags(parser)
    args = parser.parse_args(joined(sys.argv[1:]))
    options = {"precision": "fp32", **(options_from(args) or PLAN)}
    plan = shardcomp.Policy.load("llama", **options).options
    sharded = run(args.steps, SAMPLES, options)
    one = run(args.steps, SAMPLES * (plan.data or 1), {"precision": options["precision"], "seed": options.get("seed", 0)})
    print(f"{plan.ranks} ranks: {' '.join(flags(options))}")
    print(f"{'step':>4} {'plan':>12} {'one rank':>12} {'relative':>10} {'batch':>17}")
    worst = 0.0
    for step, ((a, batch), (b, other)) in enumerate(zip(sharded, one, strict=True), 1):
        worst = max(worst, abs(a - b) / abs(b))
        print(f"{step:>4} {a:>12.8f} {b:>12.8f} {abs(a - b) / abs(b):>10.1e} {batch if batch == other else 'DIFFERS':>17}")
    print(f"largest relative difference {worst:.2e}; allowed {TOLERANCE:.0e}")
    return int(not (worst <= TOLERANCE and [digest for _, digest in sharded] == [digest for _, digest in one]))


if __name__ == "__main__":
    sys.exit(main())
