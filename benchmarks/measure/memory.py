"""Print what a rank holds between micro-batches, in bytes per parameter, beside DESIGN's table.

python benchmarks/measure/memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from runtime.live_tensors import formula, samples_of_a_step

import shardcomp
from shardcomp.materialize import allocate, weights_of
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny


def measure(zero: int, data: int, **options: Any) -> tuple[float, float]:
    """Bytes per parameter on the rank that holds most, between micro-batches and at the step."""
    config = tiny(vocab_size=96, tie_word_embeddings=True)
    policy = shardcomp.Policy.load("llama", zero=zero, data=data, micro_batch=1, precision="bf16", **options)
    lowered = shardcomp.lower(config, policy, data, seq=8)
    batch = batches(96, 2 * data, 8, 0)["causal"]

    def work(rank: int) -> tuple[int, int]:
        sharded = allocate(lowered, weights_of(lowered))
        mine = {name: held.chunk(data)[rank] for name, held in batch.items()}
        optimizer = torch.optim.AdamW(sharded.parameters())
        sharded.train_step(**mine)
        sharded.optimizer_step(optimizer)
        optimizer.zero_grad()
        between, last = samples_of_a_step(sharded, optimizer, mine)
        return between.total(), last.total()

    numel = sum(p.numel() for p in lowered.model.parameters())
    most = [max(each) / numel for each in zip(*run_ranks(data, work), strict=True)]
    return most[0], most[1]


def main() -> None:
    print(f"{'zero':>4} {'data':>4} | {'between':>8} {'DESIGN':>8} | {'at step':>8} {'DESIGN':>8}")
    for zero in range(4):
        for data in (2, 4):
            between, last = measure(zero, data)
            wanted = formula(zero, data, reduced=False), formula(zero, data, reduced=True)
            print(f"{zero:>4} {data:>4} | {between:>8.3f} {wanted[0]:>8.3f} | {last:>8.3f} {wanted[1]:>8.3f}")


if __name__ == "__main__":
    main()
