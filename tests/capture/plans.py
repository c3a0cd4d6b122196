"""A plan on ranks that are threads, beside the dense model: the loss and every gradient of several calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import shardcomp
from shardcomp.verification.dense_model import Batch, batches, dense
from shardcomp.verification.sharded_model import run_plan

Make = Callable[[], nn.Module]


def batch(length: int = 8, seed: int = 0, rows: int = 2, vocabulary: int = 97) -> Batch:
    """Tokens and labels, of which each row ignores a share of its own."""
    return batches(vocabulary, rows, length, seed)["causal"]


def assert_as_dense(
    make: Make, policy: shardcomp.Policy, calls: Sequence[Batch], *, dense_model: Make | None = None, world: int | None = None
) -> None:
    """The plan gives the loss and the gradients of a dense model that was never called before, call after call.

    Args:
        make: Makes the model, always with the same weights.
        policy: Of precision fp64.
        calls: The batches, which the same sharded model takes one after another.
        dense_model: Makes what is compared with, where that is another model than `make` gives.
        world: The number of ranks; None for what the policy's degrees make.
    """
    model = make()
    given = dict(zip(["causal", *(f"call {i}" for i in range(1, len(calls)))], calls, strict=True))
    lowered = shardcomp.lower(model, policy, world, seq=calls[0]["input_ids"].shape[1])
    got = run_plan(lowered, given, [])
    for kind, each in given.items():
        expected = dense((dense_model or make)(), "fp64", {"causal": each}, [])
        torch.testing.assert_close(got.loss[kind], expected.loss["causal"], rtol=1e-12, atol=0)
        assert_alike(got.gradients[kind], expected.gradients["causal"])


def assert_alike(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every gradient, and no other, within 1e-9 of its own size."""
    assert set(got) == set(expected)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        off = float((got[name] - gradient).norm() / max(float(gradient.norm()), 1e-6 * float(norm)))
        assert off < 1e-9, f"{name}: off by {off:.1e}"
