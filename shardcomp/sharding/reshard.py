"""A reshard: the collectives that take a value from one placement to another, and the one model of what they cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import sympy

from shardcomp.errors import InternalError
from shardcomp.ir.collectives import (
    EXCHANGES,
    allgather_reducescatter,
    allgather_split,
    allreduce_identity,
    alltoall_alltoall,
    identity_allreduce,
    narrow,
    reducescatter_allgather,
    split_allgather,
)
from shardcomp.ir.layout import REPLICATED, Placement, Size, divides
from shardcomp.ir.program import B, S, Value

Step = tuple[Callable[..., Any], tuple[int, ...], Placement]
"""A collective operator, its arguments between the operand and the axis, and the placement that it leads to."""

NOMINAL = {B: 1, S: 2048}
"""Sizes for comparing costs, so that a choice does not depend on the batch."""
MESSAGE = 1.0
"""What a message costs beside its bytes, in bytes: of ways that move as much, the one of fewer messages is taken."""
_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often the whole tensor passes a rank."""


def reshard_steps(now: Placement, needed: Placement, partial_gradient: bool, requires_grad: bool, parts: int) -> list[Step]:
    """The collectives from one placement to another over `parts` ranks, given how the gradient comes back. Empty where nothing
    is to be done."""
    if now == needed:
        return [(identity_allreduce, (), REPLICATED)] if now.is_replicated and partial_gradient and requires_grad else []
    if now.is_copied and needed.is_replicated:
        return []  # each rank's gradient of it is a summand already
    if now.copies > needed.copies and needed.dim is not None:
        # Fewer copies mean more and smaller shards: each rank keeps a part of what it has.
        return [(narrow, (needed.dim, now.copies, needed.copies), needed)]
    if now.is_replicated and needed.dim is not None and needed.copies > 1:
        # The backward of `narrow` fills up with zeros. The sum of that over all ranks is the gradient.
        summed: list[Step] = [(identity_allreduce, (), REPLICATED)] if requires_grad else []
        return [*summed, (narrow, (needed.dim, parts, needed.copies), needed)]
    if now.is_replicated and needed.dim is not None:
        return [(split_allgather, (needed.dim,), needed)]
    if now.dim is not None and needed.dim is not None:
        return [(alltoall_alltoall, (now.dim, needed.dim), needed)]
    if now.dim is not None and needed.is_replicated:
        return [(allgather_reducescatter if partial_gradient else allgather_split, (now.dim,), REPLICATED)]
    if now.partial and needed.dim is not None:
        return [(reducescatter_allgather, (needed.dim,), needed)]
    if now.partial and needed.is_replicated:
        # Each summand's gradient is the full gradient of the sum, and the reader gives only a summand of that.
        tail: list[Step] = [(identity_allreduce, (), REPLICATED)] if partial_gradient and requires_grad else []
        return [(allreduce_identity, (), REPLICATED), *tail]
    raise InternalError(f"no collective from {now} to {needed}")


def reshard_bytes(value: Value, now: Placement, needed: Placement, partial_gradient: bool, parts: int) -> float:
    """What the collectives on the way move, forward and backward, in bytes; a message counts as `MESSAGE` more."""
    total = 0.0
    for target, _, _ in reshard_steps(now, needed, partial_gradient, value.requires_grad, parts):
        exchange = EXCHANGES[target]
        for op in (exchange.forward, exchange.backward if value.requires_grad else None):
            if op is not None:
                # An all-to-all passes on one shard per rank.
                total += MESSAGE + bytes_of(value) * _ROUNDS.get(op, 1 / parts)
    return total


FORBIDDEN = float("inf")
"""The cost of what no collective does."""
WEIGHT = 1e6
"""Gathering a weight is always right, but anything else is better: each of its bytes counts as this many."""


def reshard_estimate(
    value: Value,
    is_weight: bool,
    now: Placement,
    needed: Placement,
    partial_gradient: bool,
    parts: int,
    length: Size | None,
) -> float:
    """Bytes for one operand, as propagation weighs them while what comes after a call is still unknown.

    `reshard_bytes` counts what is really sent, and has the last word (see `propagation.refine`). The estimate differs where
    only the rest of the body could tell. A sum is cheap to scatter only along `length`, as the residual stream is sharded:
    scattered elsewhere it would be gathered again. A gather counts once, whatever its backward turns out to be. An all-reduce
    counts twice. The partial gradient of a replicated weight costs nothing here: it is reduced once per step.
    """
    size = bytes_of(value)
    if now == needed:
        return 2 * size if now.is_replicated and partial_gradient and value.requires_grad and not is_weight else 0.0
    # Each rank has a summand of its gradient, so only a reader that gives summands may read it as it is.
    if now.is_copied and needed.is_replicated:
        return 0.0 if partial_gradient or not value.requires_grad else FORBIDDEN
    if now.copies > needed.copies and not needed.partial and needed.dim is not None:
        return 1.0 if is_narrowing(value, now, needed, parts) else FORBIDDEN
    if now.is_replicated and needed.dim is not None and needed.copies > 1:
        fits = divides(value.shape[needed.dim], parts // needed.copies)
        return (2 * size if value.requires_grad else 0.0) if fits else FORBIDDEN
    # No collective joins copies again, or makes a value partial.
    if now.copies > 1 or needed.copies > 1 or needed.partial:
        return FORBIDDEN
    split_sizes = [value.shape[placement.dim] for placement in (now, needed) if placement.dim is not None]
    # A collective takes shards of one size.
    if now.is_sharded and not all(divides(size, parts) for size in split_sizes):
        return FORBIDDEN
    if is_weight:
        return size * WEIGHT
    # Nothing is sent to split a value, but its gradient is gathered.
    if now.is_replicated:
        return size if value.requires_grad else 0.0
    if now.partial:
        scattered = needed.dim is not None and length is not None and value.shape[needed.dim] == length
        return size * (1 if scattered else 2 if needed.is_replicated else 3)
    return size


def is_narrowing(value: Value, now: Placement, needed: Placement, parts: int) -> bool:
    """Whether a rank finds the shard that is needed within the shard that it has."""
    if needed.dim is None or now.dim not in (None, needed.dim) or now.copies % needed.copies:
        return False
    return divides(value.shape[needed.dim], parts // needed.copies)


def bytes_of(value: Value) -> float:
    """The size of a value at nominal sizes of the batch."""
    return _numel(value.shape) * value.dtype.itemsize


@cache
def _numel(shape: tuple[Size, ...]) -> float:
    return float(sympy.sympify(sympy.prod(shape)).subs(NOMINAL))
