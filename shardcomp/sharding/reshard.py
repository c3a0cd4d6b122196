"""From one placement of a value to another: the collectives that bring it there, and what they move."""

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
from shardcomp.ir.layout import WHOLE, Placement, Size
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
        return [(identity_allreduce, (), WHOLE)] if now.is_whole and partial_gradient and requires_grad else []
    if now.is_copied and needed.is_whole:
        return []  # each rank's gradient of it is a summand already
    if now.copies > needed.copies and needed.dim is not None:
        return [(narrow, (needed.dim, now.copies, needed.copies), needed)]
    if now.is_whole and needed.dim is not None and needed.copies > 1:
        summed: list[Step] = [(identity_allreduce, (), WHOLE)] if requires_grad else []
        return [*summed, (narrow, (needed.dim, parts, needed.copies), needed)]
    if now.is_whole and needed.dim is not None:
        return [(split_allgather, (needed.dim,), needed)]
    if now.dim is not None and needed.dim is not None:
        return [(alltoall_alltoall, (now.dim, needed.dim), needed)]
    if now.dim is not None and needed.is_whole:
        return [(allgather_reducescatter if partial_gradient else allgather_split, (now.dim,), WHOLE)]
    if now.partial and needed.dim is not None:
        return [(reducescatter_allgather, (needed.dim,), needed)]
    if now.partial and needed.is_whole:
        tail: list[Step] = [(identity_allreduce, (), WHOLE)] if partial_gradient and requires_grad else []
        return [(allreduce_identity, (), WHOLE), *tail]
    raise InternalError(f"no collective from {now} to {needed}")


def reshard_bytes(held: Value, now: Placement, needed: Placement, partial_gradient: bool, parts: int) -> float:
    """What the collectives on the way move, forward and backward, in bytes; a message counts as `MESSAGE` more."""
    total = 0.0
    for target, _, _ in reshard_steps(now, needed, partial_gradient, held.requires_grad, parts):
        exchange = EXCHANGES[target]
        for op in (exchange.forward, exchange.backward if held.requires_grad else None):
            if op is not None:
                total += MESSAGE + bytes_of(held) * _ROUNDS.get(op, 1 / parts)
    return total


def bytes_of(held: Value) -> float:
    """The size of a value at nominal sizes of the batch."""
    return _numel(held.shape) * held.dtype.itemsize


@cache
def _numel(shape: tuple[Size, ...]) -> float:
    return float(sympy.sympify(sympy.prod(shape)).subs(NOMINAL))
