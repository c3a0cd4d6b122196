"""Measure how long a step waits for a save, synchronous and asynchronous.

    python benchmarks/measure/saving.py [--saves 9] [--hidden 512]

Two processes train under ZeRO 3, with a save after every step. The losses of both kinds of saving must be those of a run that
saves nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

import shardcomp
from shardcomp import checkpoint, presets

ROOT = Path(__file__).parents[2]


def train(folder: str | None, asynchronous: bool, saves: int, hidden: int) -> tuple[list[float], list[float], list[float]]:
    """Train with one kind of saving, or none. Returns losses, the seconds that steps waited for saves, and those of steps."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    policy = shardcomp.Policy.load("llama", data=2, zero=3, precision="fp32")
    sharded = shardcomp.shard(presets.build(config), policy)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=1e-3, foreach=True)
    stream = shardcomp.SampleStream(torch.arange(64 * 64).view(64, 64) % 512, 0, dist.get_rank(), 2)
    saver = checkpoint.Saver(folder, keep=2, asynchronous=asynchronous) if folder else None
    losses, waits, steps = [], [], []
    for step in range(1, saves + 2):
        began = time.perf_counter()
        tokens, _ = stream.next(2)
        losses.append(float(sharded.train_step(input_ids=tokens, labels=tokens).loss))
        sharded.optimizer_step(optimizer)
        optimizer.zero_grad()
        steps.append(time.perf_counter() - began)
        if saver is not None:
            dist.barrier()
            began = time.perf_counter()
            saver.save(sharded, optimizer, step=step)
            waits.append(time.perf_counter() - began)
            time.sleep(0 if not asynchronous else 2)  # a real run's steps take longer: the writer has time
    if saver is not None:
        saver.close()
    return losses, waits[1:], steps[1:]  # the first save allocates memory for the copies


def worker(saves: int, hidden: int) -> int:
    """One rank. It trains with every kind of saving in turn, and rank 0 prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [scratch]
        dist.init_process_group("gloo")
        dist.broadcast_object_list(folders, src=0)
        runs = {
            "none": train(None, False, saves, hidden),
            "synchronous": train(folders[0] + "/sync", False, saves, hidden),
            "asynchronous": train(folders[0] + "/async", True, saves, hidden),
        }
        equal = all(losses == runs["none"][0] for losses, *_ in runs.values())
        size = (
            sum(f.stat().st_size for f in next(Path(folders[0]).glob("async/step-*")).iterdir()) if not dist.get_rank() else 0
        )
        dist.barrier()
        if dist.get_rank() == 0:
            table = Table("saving", "a step waits, median", "least", "most", "a step without it")
            for name in ("synchronous", "asynchronous"):
                _, waits, steps = runs[name]
                shown = [f"{1000 * seconds:.1f} ms" for seconds in (statistics.median(waits), min(waits), max(waits))]
                table.add_row(name, *shown, f"{1000 * statistics.median(steps):.0f} ms")
            ratio = statistics.median(runs["synchronous"][1]) / statistics.median(runs["asynchronous"][1])
            console = Console()
            console.print(table)
            console.print(f"{size / 2**20:.0f} MiB a checkpoint, {saves} saves of each kind, torch {torch.__version__}")
            console.print("asynchronous saves are 2 s apart, as in a real run")
            console.print(
                f"asynchronous keeps a step {ratio:.1f} times shorter; losses equal bit for bit: {'yes' if equal else 'NO'}"
            )
        dist.destroy_process_group()
    return 0 if equal else 1


def main() -> int:
    """Run the command: start two processes that measure. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size; a checkpoint grows with its square")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return worker(args.saves, args.hidden)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, "--saves", str(args.saves), "--hidden", str(args.hidden)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
