"""What the tests of the module contract share: the plans, and a dense model and a sharded one with the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import shardcomp
from shardcomp import presets
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny

T = TypeVar("T")
Batch = dict[str, Tensor]
Call = tuple[tuple[tuple[str, int], ...], tuple[str, ...], bool | None]

PLANS: dict[str, dict[str, int]] = {
    "one rank": {},
    "tensor 2": {"tensor": 2},
    **{f"data 2, zero {zero}": {"data": 2, "zero": zero} for zero in range(4)},
    "tensor 2, data 2, zero 3": {"tensor": 2, "data": 2, "zero": 3},
    "pipeline 2": {"pipeline": 2},
}
"""Every row of docs/module_contract.md holds under these."""
FLAT = [name for name, options in PLANS.items() if "pipeline" not in options]
"""Those under which a model is called, `sharded(...)`: under a pipeline, whole steps run."""

LOSS: Call = ((("input_ids", 2), ("labels", 2)), ("loss",), True)
LOGITS: Call = ((("input_ids", 2),), ("logits",), True)
BOTH: Call = ((("input_ids", 2), ("labels", 2)), ("loss", "logits"), True)


def model(**changes: Any) -> nn.Module:
    """A small dense model with numbers that leave no gradient near zero."""
    found = shardcomp.initialize(presets.build(tiny(**changes)), 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(torch.rand(p.shape, generator=draw) if p.dim() < 2 else 0.3 * torch.randn(p.shape, generator=draw))
    return found.train()


def make_batch(rows: int = 4, length: int = 8, seed: int = 1) -> Batch:
    """A batch in which every row has some labels that do not count."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (rows, length), generator=draw)
    return {"input_ids": ids, "labels": torch.where(torch.rand(ids.shape, generator=draw) < 0.2, -100, ids)}


def lowered(plan: str, dense: nn.Module, calls: tuple[Call, ...] = (), trained: Any = None, **options: Any) -> Lowered:
    """A model lowered for a plan, and for further calls: tracing is not for threads."""
    policy = shardcomp.Policy.load("auto", **{"precision": "fp64", **PLANS[plan], **options})
    found = shardcomp.lower(dense, policy, seq=8)
    for call in calls:
        found.for_call(call, (4, 8), trained)
    return found


@functools.cache
def usual(plan: str) -> Lowered:
    """The usual model, lowered once for each plan."""
    calls = (LOSS, BOTH, LOGITS) if plan in FLAT else (LOSS,)
    return lowered(plan, model(), calls)


def run(lowered: Lowered, work: Callable[[ShardedModel], T]) -> list[T]:
    """Call `work` with the sharded model of every rank; ranks are threads."""
    weights = weights_of(lowered)

    def rank(_: int) -> T:
        torch.set_num_threads(1)
        return work(allocate(lowered, weights))

    return run_ranks(lowered.mesh.world_size, rank)


def mine(sharded: ShardedModel, batch: Mapping[str, Tensor]) -> Batch:
    """This data-parallel rank's samples."""
    size, rank = sharded.mesh["dp"].size(), sharded.mesh.get_local_rank("dp")
    return {name: tensor.chunk(size)[rank] for name, tensor in batch.items()}


def double(dense: nn.Module) -> nn.Module:
    """The dense model in float64, the casts of its code included: see `exactly`."""
    from shardcomp.verification.dense_model import in_dtype

    return in_dtype(dense, torch.float64).train(dense.training)


def exactly() -> Any:
    """A context in which the dense model's casts to float32 stay float64."""
    from shardcomp.ir.precision import Widened

    return Widened()


def gradients(dense: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The dense model's gradients of a loss, in float64."""
    twin = double(dense)
    with exactly():
        loss(twin).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def assert_gradients(sharded: ShardedModel, expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Every gradient of this rank is the dense model's: ‖g − g₀‖ ≤ tolerance · max(‖g₀‖, 1e-6 · ‖all g₀‖)."""
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    found = {name: full_tensor(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
    own = {name for name, _ in sharded.named_parameters() if name in expected}
    assert found.keys() == own, found.keys() ^ own
    for name, gradient in found.items():
        off = (gradient - expected[name]).norm() / torch.maximum(expected[name].norm(), 1e-6 * total)
        assert off <= tolerance, f"{name}: off by {float(off):.1e}"
