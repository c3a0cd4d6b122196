"""Print the memory of a rank between micro-batches, in bytes per parameter, beside the formulas for ZeRO 0 to 3.

PYTHONPATH=.:tests python benchmarks/measure/memory.py
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
    """Bytes per parameter on the rank that has most, between micro-batches and at the step."""
    config = tiny(vocab_size=96, tie_word_embeddings=True)
    policy = shardcomp.Policy.load("llama", zero=zero, data=data, micro_batch=1, precision="bf16", **options)
    lowered = shardcomp.lower(config, policy, data, seq=8)
    batch = batches(96, 2 * data, 8, 0)["causal"]

    def work(rank: int) -> tuple[int, int]:
        sharded = allocate(lowered, weights_of(lowered))
        own_rows = {name: tensor.chunk(data)[rank] for name, tensor in batch.items()}
        optimizer = torch.optim.AdamW(sharded.parameters())
        sharded.train_step(**own_rows)
        sharded.optimizer_step(optimizer)
        optimizer.zero_grad()
        between, last = samples_of_a_step(sharded, optimizer, own_rows)
        return between.total(), last.total()

    numel = sum(p.numel() for p in lowered.model.parameters())
    between, last = (max(sizes) / numel for sizes in zip(*run_ranks(data, work), strict=True))
    return between, last


def main() -> None:
    print(f"{'zero':>4} {'data':>4} | {'between':>8} {'formula':>8} | {'at step':>8} {'formula':>8}")
    for zero in range(4):
        for data in (2, 4):
            between, last = measure(zero, data)
            expected = formula(zero, data, reduced=False), formula(zero, data, reduced=True)
            print(f"{zero:>4} {data:>4} | {between:>8.3f} {expected[0]:>8.3f} | {last:>8.3f} {expected[1]:>8.3f}")


if __name__ == "__main__":
    main()
