"""Collectives as operators with a fixed forward and backward, each named for both.

A lowered program communicates through these and through the split forms of kernels, and in no other way, so that reading a
listing tells every message of the forward and of the backward pass. `dim` is a dimension of the tensor, `axis` the axis of the
mesh. Shapes below are local: n ranks on the axis, D the length of `dim`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as a rank sees it, and the messages that can be sent along it. Every result is a new tensor."""

    name: str
    size: int
    rank: int
    group: Any = None
    """The process group; None where the axis is one rank long."""
    unit: str = field(default="", kw_only=True)
    """The unit that sends, for messages: in a backward no other sign of it is on the stack."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the axis."""
        # The message is received in place, and autograd may have saved x.
        total = x.clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            self.send("all_reduce", total, total)
        return total

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The shards of all ranks joined along `dim`: [.., D, ..] -> [.., n D, ..]."""
        shards = x.new_empty((self.size, *x.shape))
        if self.size > 1:
            self.send("all_gather", x.contiguous().view(-1), shards.view(-1))
        else:
            shards[0] = x
        # [n, .., D, ..] as received -> [.., n, D, ..] -> [.., n D, ..]: the shards one after another along `dim`.
        return shards.movedim(0, dim).flatten(dim, dim + 1)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's shard of the sum over the axis: [.., D, ..] -> [.., D / n, ..]."""
        # [.., D, ..] -> [n, .., D / n, ..]: the message goes by memory, so the shard of each rank must be one block.
        shards = x.unflatten(dim, (self.size, -1)).movedim(dim, 0).contiguous()
        if self.size == 1:
            return shards[0].clone()
        result = torch.empty_like(shards[0])
        self.send("reduce_scatter", shards.view(-1), result.view(-1))
        return result

    def all_to_all(self, x: Tensor, gather: int, scatter: int) -> Tensor:
        """Moves a split from dimension `gather` to dimension `scatter`."""
        # One block for each receiver, as in `reduce_scatter`. One block comes back from each sender, joined along `gather`.
        sent = x.unflatten(scatter, (self.size, -1)).movedim(scatter, 0).contiguous()
        received = torch.empty_like(sent)
        if self.size > 1:
            self.send("all_to_all", sent.view(-1), received.view(-1))
        else:
            received.copy_(sent)
        return received.movedim(0, gather).flatten(gather, gather + 1)

    def send(self, op: str, tensor: Tensor, received: Tensor) -> None:
        """One message, which fills `received`: every message of the axis goes through here."""
        if op == "all_reduce":
            dist.all_reduce(received, group=self.group)
        elif op == "all_gather":
            _all_gather(received, tensor, group=self.group)
        elif op == "reduce_scatter":
            _reduce_scatter(received, tensor, group=self.group)
        else:
            dist.all_to_all_single(received, tensor, group=self.group)

    def local_shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's shard of a replicated tensor: [.., D, ..] -> [.., D / n, ..], without a message."""
        return x.unflatten(dim, (self.size, -1)).select(dim, self.rank).contiguous()


class _Pair(torch.autograd.Function):
    """Runs `forward(x)`, and `backward(gradient)` on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.backward_of = backward
        result = forward(x)
        return x.view_as(x) if result is x else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_of(gradients[0]), None, None


def identity_allreduce(x: Tensor, axis: Axis) -> Tensor:
    """Replicated to replicated, before a call that also reads sharded operands: each rank's gradient is one summand."""
    return _Pair.apply(x, lambda t: t, lambda g: axis.all_reduce(g))


def allreduce_identity(x: Tensor, axis: Axis) -> Tensor:
    """Partial to replicated: sums the ranks' results; the gradient of the sum is the gradient of each summand."""
    # y = Σ xᵢ, so ∂y / ∂xᵢ = 1 on every rank.
    return _Pair.apply(x, lambda t: axis.all_reduce(t), lambda g: g)


def allgather_reducescatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sharded to replicated, where each rank's gradient is one summand."""
    return _Pair.apply(x, lambda t: axis.all_gather(t, dim), lambda g: axis.reduce_scatter(g, dim))


def reducescatter_allgather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Partial to split."""
    return _Pair.apply(x, lambda t: axis.reduce_scatter(t, dim), lambda g: axis.all_gather(g, dim))


def split_allgather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Replicated to sharded: keeps this rank's shard; the gradient is joined from all shards."""
    return _Pair.apply(x, lambda t: axis.local_shard(t, dim), lambda g: axis.all_gather(g, dim))


def allgather_split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sharded to replicated, where every rank has the full gradient."""
    return _Pair.apply(x, lambda t: axis.all_gather(t, dim), lambda g: axis.local_shard(g, dim))


def narrow(x: Tensor, dim: int, copies: int, left: int, axis: Axis) -> Tensor:
    """Shards with `copies` neighbouring ranks each to smaller ones with `left`: keeps this rank's part of its shard.

    No message: the gradient of the shard is zero outside this part, and is a summand, as for every shard with copies.
    """
    # rank % copies is the place among the ranks with one shard. Each `left` of them, side by side, keep the same part of it.
    return _Narrow.apply(x, dim, copies // left, axis.rank % copies // left)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, shards: int, index: int) -> Tensor:
        ctx.place = x.shape, dim, shards, index
        return x.unflatten(dim, (shards, -1)).select(dim, index).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        shape, dim, shards, index = ctx.place
        full = gradients[0].new_zeros(shape)
        full.unflatten(dim, (shards, -1)).select(dim, index).copy_(gradients[0])
        return full, None, None, None


def alltoall_alltoall(x: Tensor, gather: int, scatter: int, axis: Axis) -> Tensor:
    """Split along `gather` to split along `scatter`."""
    return _Pair.apply(x, lambda t: axis.all_to_all(t, gather, scatter), lambda g: axis.all_to_all(g, scatter, gather))


@dataclass(frozen=True)
class Exchange:
    """The messages of a collective operator: the operation that each pass does, None where it does none."""

    forward: str | None
    backward: str | None


EXCHANGES: dict[Callable[..., Tensor], Exchange] = {
    identity_allreduce: Exchange(None, "all_reduce"),
    allreduce_identity: Exchange("all_reduce", None),
    allgather_reducescatter: Exchange("all_gather", "reduce_scatter"),
    reducescatter_allgather: Exchange("reduce_scatter", "all_gather"),
    split_allgather: Exchange(None, "all_gather"),
    allgather_split: Exchange("all_gather", None),
    alltoall_alltoall: Exchange("all_to_all", "all_to_all"),
    narrow: Exchange(None, None),
}
"""Every collective operator. The forward passes in the operand, the backward the gradient of the result."""
