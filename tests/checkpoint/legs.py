"""Legs of one training run, each under a plan of its own, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig

import shardcomp
from shardcomp import checkpoint, presets
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.training.sample_stream import digest_text
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize

BATCH, LENGTH = 12, 8
SAMPLES = torch.randint(0, 97, (40, LENGTH), generator=torch.Generator().manual_seed(5))


@dataclass
class Leg:
    """What a leg showed: the loss and the batch of every step, and the weights at its end."""

    losses: list[float]
    digests: list[str]
    weights: dict[str, Tensor]
    restored: checkpoint.Restored | None = None


def lowered_for(config: PretrainedConfig, policy: str = "llama", **options: Any) -> Lowered:
    chosen = shardcomp.Policy.load(policy, **{"precision": "fp64", "micro_batch": 2, **options})
    return shardcomp.lower(initialize(presets.build(config), 0), chosen, seq=LENGTH)


def adamw(model: nn.Module, kind: type[torch.optim.Optimizer] = shardcomp.AdamW) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=3e-3)


def train(
    lowered: Lowered,
    steps: int,
    *,
    load: Path | None = None,
    save: Path | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    around: Callable[[ShardedModel], None] = lambda sharded: None,
) -> Leg:
    """Steps up to `steps`, from the start or from a checkpoint, and a checkpoint at the end."""

    def work(rank: int) -> Leg:
        sharded = allocate(lowered, weights_of(lowered))
        chosen = optimizer(sharded)
        scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + step))
        axis = sharded.mesh["dp"]
        stream = shardcomp.Stream(SAMPLES, 3, axis.get_local_rank(), axis.size())
        found = checkpoint.load(load, sharded, chosen, scheduler=scheduler) if load else None
        if found is not None:
            stream.load_state_dict(found.extra)
        leg = Leg([], [], {}, found)
        for _ in range(found.step if found else 0, steps):
            tokens, mine = stream.next(BATCH // axis.size())
            step = sharded.train_step(input_ids=tokens, labels=tokens)
            sharded.clip_grad_norm_(1.0)
            sharded.optimizer_step(chosen)
            scheduler.step()
            chosen.zero_grad()
            leg.losses.append(float(step.loss))
            everyones = torch.tensor([mine])
            dist.all_reduce(everyones, group=axis.get_group())
            leg.digests.append(digest_text(int(everyones)))
        if save:
            checkpoint.save(save, sharded, chosen, step=steps, scheduler=scheduler, extra=stream.state_dict())
        around(sharded)
        leg.weights = {name: full_tensor(held.parameters[0].detach()) for name, held in sharded.local_shards().items()}
        return leg

    legs = run_ranks(lowered.mesh.world_size, work)
    weights = {name: held for leg in legs for name, held in leg.weights.items()}
    assert all(leg.losses == legs[0].losses for leg in legs)
    return Leg(legs[0].losses, legs[0].digests, weights, legs[0].restored)


def close(found: Leg, wanted: Leg) -> None:
    """DESIGN 10.1: the losses within 1e-9, the weights within 1e-9 of their norm; the same batches."""
    tail = slice(len(wanted.losses) - len(found.losses), None)
    assert found.digests == wanted.digests[tail]
    for loss, exact in zip(found.losses, wanted.losses[tail], strict=True):
        assert abs(loss - exact) <= 1e-9 * abs(exact)
    for name, held in found.weights.items():
        exact = wanted.weights[name]
        assert float((held - exact).norm()) <= 1e-9 * float(exact.norm()), name


def same(found: Leg, wanted: Leg) -> None:
    """Bit for bit."""
    tail = slice(len(wanted.losses) - len(found.losses), None)
    assert (found.losses, found.digests) == (wanted.losses[tail], wanted.digests[tail])
    for name, held in found.weights.items():
        assert torch.equal(held, wanted.weights[name]), name
