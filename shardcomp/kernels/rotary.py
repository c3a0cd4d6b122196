"""Rotary positions of queries and keys together. The backward turns the other way and needs nothing but the tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.layout import same
from shardcomp.ir.program import tensor_arguments, value
from shardcomp.kernels.register import define, differentiate, laid_out, widened
from shardcomp.sharding.rules import HEADS, RULES, Dims, Factoring, Rule


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, round_each: bool = False
) -> tuple[Tensor, Tensor]:
    """`q` and `k`, of whose features the first r are turned, x · cos + turned(x) · sin, and the others passed through.

    q, k: [.., d] of one rank and dtype, in any order of dimensions before the features. cos, sin: [.., r], which broadcast to
    [.., r] of both and need no gradient. turned: (-x₂, x₁), where x₁ and x₂ are the two halves of the r features, or where
    `interleaved` those at even and at odd places.
    round_each: products and sum are each rounded to the common dtype of x and the tables; else all of it is computed in
    float32 (float64 for float64) and rounded once. Results: in the shapes and the dtype of q and k.
    """
    made = torch.ops.shardcomp.rotary(q, k, cos, sin, interleaved, round_each)
    return made[0], made[1]


def _turned(x: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """(-x₂, x₁); back: what that is the transpose of, (x₂, -x₁)."""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    first, second = (second, -first) if back else (-second, first)
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def _one(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, round_each: bool) -> Tensor:
    part = x[..., : cos.shape[-1]]
    if not round_each:
        part, cos, sin = widened(part), widened(cos), widened(sin)
    return _beside(part * cos + _turned(part, interleaved) * sin, x)


def _beside(made: Tensor, x: Tensor) -> Tensor:
    """`made` in the place of the first features of `x`, as many as it has."""
    size = made.shape[-1]
    return laid_out(made.to(x.dtype) if size == x.shape[-1] else torch.cat((made.to(x.dtype), x[..., size:]), -1), x)


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, round_each: bool) -> tuple[Tensor, Tensor]:
    return _one(q, cos, sin, interleaved, round_each), _one(k, cos, sin, interleaved, round_each)


def _one_back(gradient: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of x, rounded once."""
    part = widened(gradient[..., : cos.shape[-1]])
    return _beside(part * widened(cos) + _turned(part * widened(sin), interleaved, back=True), gradient)


def _back(of_q: Tensor, of_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _one_back(of_q, cos, sin, interleaved), _one_back(of_k, cos, sin, interleaved)


def _shapes(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, ctx.interleaved, _ = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *torch.ops.shardcomp.rotary_bwd(of_q, of_k, cos, sin, ctx.interleaved), None, None, None, None


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool round_each) -> (Tensor, Tensor)",
    _forward,
    _shapes,
)
define("rotary_bwd(Tensor of_q, Tensor of_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)", _back, _shapes)
differentiate("rotary", _backward, _save)


def _rule(node: fx.Node) -> Factoring:
    """Everything but the features may be cut; where there are fewer heads of keys than ranks, these are held in copies."""
    shapes = [value(operand).shape for operand in tensor_arguments(node)]
    rank = len(shapes[0])
    names = [f"d{i}" for i in range(rank - 1)]
    narrow = [i for i in range(rank - 1) if all(len(t) < rank - i or same(t[i - rank], 1) for t in shapes[2:])]
    if narrow:
        names[narrow[-1]] = HEADS  # the innermost dimension that the tables repeat
    tables = []
    for table in shapes[2:]:
        places = range(rank - len(table), rank - 1)
        tables.append((*(names[i] if same(table[i - rank], shapes[0][i]) else None for i in places), None))
    whole: Dims = (*names, None)
    return Factoring((whole, whole, *tables), (whole, whole), coarse=frozenset({1}), alike={0: 0, 1: 1})


RULES[rotary] = Rule(function=_rule)
