"""Ranks as threads, and every collective operator on them: forward and backward are adjoint."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardcomp.errors import PlanError, VerifyError
from shardcomp.ir import collectives
from shardcomp.ir.mesh import Mesh
from shardcomp.runtime import world
from shardcomp.verification import thread_ranks
from shardcomp.verification.thread_ranks import run_ranks

N = 4
# operator -> (how the operand lies, how the result lies, how the gradient of the operand lies), w: whole, s: split, p: partial
LIES: dict[Callable[..., Tensor], tuple[tuple[int, ...], str, str]] = {
    collectives.identity_allreduce: ((), "w", "w"),
    collectives.allreduce_identity: ((), "p", "w"),
    collectives.allgather_reducescatter: ((1,), "s", "w"),
    collectives.reducescatter_allgather: ((1,), "p", "s"),
    collectives.split_allgather: ((1,), "w", "s"),
    collectives.allgather_split: ((1,), "s", "w"),
    collectives.alltoall_alltoall: ((1, 2), "s", "s"),
}


@pytest.mark.parametrize("operator", LIES, ids=lambda op: op.__name__)
def test_a_collective_keeps_the_value_and_its_backward_is_its_adjoint(operator: Callable[..., Tensor]) -> None:
    dims, before, after = LIES[operator]
    torch.manual_seed(0)
    whole = torch.randn(2, 8, 12, dtype=torch.float64)
    summands = [torch.randn_like(whole) for _ in range(N - 1)]
    summands.append(whole - sum(summands))
    last = dims[-1] if dims else 1

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mesh, _ = world.start(Mesh(tp=N))
        axis = world.axes_of(mesh)["tp"]
        first = dims[0] if dims else 1
        local = {"w": whole, "s": whole.chunk(N, first)[rank], "p": summands[rank]}[before].clone().requires_grad_()
        result = operator(local, *dims, axis)
        expected = whole.chunk(N, last)[rank] if after == "s" else whole
        seed = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(rank))
        result.backward(seed)
        return result.detach(), expected, seed, local.grad

    found = run_ranks(N, work)
    for result, expected, _, _ in found:
        torch.testing.assert_close(result, expected)
    seeds = [seed for _, _, seed, _ in found]
    if operator is collectives.identity_allreduce:
        wanted = [sum(seeds)] * N
    elif operator is collectives.allreduce_identity:
        wanted = seeds
    elif operator is collectives.allgather_reducescatter:
        wanted = list(sum(seeds).chunk(N, 1))
    elif operator in (collectives.reducescatter_allgather, collectives.split_allgather):
        wanted = [torch.cat(seeds, 1)] * N
    elif operator is collectives.allgather_split:
        wanted = [seed.chunk(N, 1)[rank] for rank, seed in enumerate(seeds)]
    else:
        wanted = list(torch.cat(seeds, 2).chunk(N, 1))
    for (_, _, _, gradient), expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_axes_are_laid_out_with_tensor_parallel_ranks_next_to_each_other() -> None:
    def work(rank: int) -> tuple[int, int]:
        mesh, _ = world.start(Mesh(dp=2, tp=2))
        axes = world.axes_of(mesh)
        return axes["dp"].rank, axes["tp"].rank

    assert run_ranks(4, work) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_failing_rank_ends_the_others_and_its_error_is_raised() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise PlanError("rank one does not like it")
        dist.barrier()

    with pytest.raises(PlanError, match="rank one"):
        run_ranks(2, work)
    with pytest.raises(VerifyError, match="ZeroDivisionError"):
        run_ranks(2, lambda rank: 1 // rank)
    assert run_ranks(2, lambda rank: rank) == [0, 1]


def test_a_failing_rank_ends_the_run_also_where_others_wait_for_a_new_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_ranks, "GRACE", 0.5)

    def work(rank: int) -> None:
        if rank == 1:
            raise PlanError("rank one does not like it")
        dist.new_group([0, 1])

    began = time.monotonic()
    with pytest.raises(PlanError, match="rank one"):
        run_ranks(2, work)
    assert time.monotonic() - began < 30
