"""Train the tiny preset under a plan and on one rank with the same global batch, both in float32, and print their losses.

    PYTHONPATH=examples/llama python tests/measure_losses.py
    PYTHONPATH=examples/llama python tests/measure_losses.py --steps 50 --pipeline 4 --schedule zbv

Without options the plan is --tensor 2 --pipeline 2 --data 2 --zero 1 --schedule interleaved. The text, the order of its
samples, the optimizer and its learning rates are those of `make pretrain`; each rank is a process, under gloo. Exit status 1
where a loss differs by more than 1e-5 of itself.
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

import torch
import torch.distributed as dist

import data
import pretrain
import shardcomp
from shardcomp import presets
from shardcomp.options import add_option_flags, flags, options_from

PLAN = {"tensor": 2, "pipeline": 2, "data": 2, "zero": 1, "schedule": "interleaved"}
TRAIN = ["--config", "tiny", "--max-length", "256", "--steps", "300", "--warmup", "20", "--lr", "2e-3"]
"""As the Makefile has it: the schedule is that of 300 steps, of which the first are made."""
SAMPLES = 8  # of a data-parallel rank
TOLERANCE = 1e-5


def losses(steps: int, samples: int, options: dict[str, Any]) -> list[float]:
    """The loss of each step on this rank, whose data-parallel group has `samples` in a step."""
    args = pretrain.parser().parse_args([*TRAIN, "--batch-size", str(samples)])
    policy = shardcomp.Policy.load("llama", **options)
    corpus = data.build(data.standard_library(), args.max_length)
    sharded = shardcomp.shard(presets.build(presets.config_of(args.config)), policy)
    rank, ranks = sharded.mesh["dp"].get_local_rank(), sharded.mesh["dp"].size()
    optimizer = pretrain.adamw(sharded, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pretrain.learning_rate(step, args.steps, args.warmup))
    found = []
    for done in range(steps):
        tokens = data.shuffled(corpus.train, (done * ranks + rank) * samples, samples, policy.options.seed)
        found.append(float(sharded.train_step(input_ids=tokens, labels=tokens).loss))
        sharded.clip_grad_norm_(args.grad_clip)
        sharded.optimizer_step(optimizer)
        schedule.step()
        optimizer.zero_grad()
    return found


def run(steps: int, samples: int, options: dict[str, Any]) -> list[float]:
    """`losses` of rank 0, in processes of their own."""
    world = shardcomp.Policy.load("llama", **options).options.ranks
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "losses.json"
        work = json.dumps({"steps": steps, "samples": samples, "options": options})
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run([sys.executable, *launch, __file__, "--work", work, "--into", str(into)], check=True, env=env)
        found: list[float] = json.loads(into.read_text())
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    add_option_flags(parser)
    args = parser.parse_args()
    if args.work:
        found = losses(**json.loads(args.work))
        if dist.get_rank() == 0:
            args.into.write_text(json.dumps(found))
        dist.destroy_process_group()
        return 0
    options = {"precision": "fp32", **(options_from(args) or PLAN)}
    ranks = shardcomp.Policy.load("llama", **options).options
    alone = {"precision": options["precision"], "seed": options.get("seed", 0)}
    mine = run(args.steps, SAMPLES, options)
    one = run(args.steps, SAMPLES * (ranks.data or 1), alone)
    print(f"{ranks.ranks} ranks: {' '.join(flags(options))}")
    print(f"{'step':>4} {'plan':>12} {'one rank':>12} {'relative':>10}")
    worst = 0.0
    for step, (a, b) in enumerate(zip(mine, one, strict=True), 1):
        worst = max(worst, abs(a - b) / abs(b))
        print(f"{step:>4} {a:>12.8f} {b:>12.8f} {abs(a - b) / abs(b):>10.1e}")
    print(f"largest relative difference {worst:.2e}; allowed {TOLERANCE:.0e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
