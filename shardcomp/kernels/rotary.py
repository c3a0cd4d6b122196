"""Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864) of queries and keys together.

The backward rotates by the negative angle and needs the tables alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.layout import same
from shardcomp.ir.nodes import tensor_arguments, value
from shardcomp.kernels.register import define, differentiate, laid_out, register, widened
from shardcomp.kernels.small_cases import Calls, Samples
from shardcomp.sharding.notation import Dims
from shardcomp.sharding.rules import HEADS, Factoring


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, round_each: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the first r features of `q` and `k`: x · cos + (-x₂, x₁) · sin. The other features stay as they are.

    x₁ and x₂ are the two halves of the r features, or with `interleaved` the features at even and at odd indices.

    Args:
        q: [.., d] floating, with any order of the leading dimensions.
        k: [.., d], the dtype and number of dimensions of `q`.
        cos: [.., r], broadcasts to [.., r] of both; gets no gradient.
        sin: as `cos`.
        interleaved: pairs are neighbours (GPT-J), else halves (LLaMA).
        round_each: round both products and the sum to the common dtype of x and the tables, as a model in that dtype does; else
            compute in float32 (float64 for float64) and round once.

    Returns:
        The rotated `q` and `k`, in their shapes and dtype.

    Raises:
        RuntimeError: the tables have more features than `q` or `k`, or with `interleaved` an odd number (by the compiled
            kernel).

    Example:
        >>> import torch
        >>> q, zero, one = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), torch.ones(1, 2)
        >>> rotary(q, q, cos=zero, sin=one)[0]  # by 90 degrees
        tensor([[-2.,  1.]])
    """
    results = torch.ops.shardcomp.rotary(q, k, cos, sin, interleaved, round_each)
    return results[0], results[1]


def _partners(x: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """(-x₂, x₁); back: its transpose, (x₂, -x₁)."""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    first, second = (second, -first) if back else (-second, first)
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, round_each: bool) -> Tensor:
    features = x[..., : cos.shape[-1]]
    if not round_each:
        features, cos, sin = widened(features), widened(cos), widened(sin)
    return _with_rest(features * cos + _partners(features, interleaved) * sin, x)


def _with_rest(rotated: Tensor, x: Tensor) -> Tensor:
    """The rotated features followed by the remaining features of `x`, with the strides of `x`."""
    size, rotated = rotated.shape[-1], rotated.to(x.dtype)
    return laid_out(rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), -1), x)


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, round_each: bool) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin, interleaved, round_each), _rotate(k, cos, sin, interleaved, round_each)


def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of x, rounded once."""
    features = widened(gradient[..., : cos.shape[-1]])
    return _with_rest(features * widened(cos) + _partners(features * widened(sin), interleaved, back=True), gradient)


def _back(of_q: Tensor, of_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _rotate_back(of_q, cos, sin, interleaved), _rotate_back(of_k, cos, sin, interleaved)


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
    """Every dimension but the features may be split. Key heads are replicated where there are fewer of them than ranks."""
    shapes = [value(operand).shape for operand in tensor_arguments(node)]
    rank = len(shapes[0])
    names = [f"d{i}" for i in range(rank - 1)]
    narrow = [i for i in range(rank - 1) if all(len(t) < rank - i or same(t[i - rank], 1) for t in shapes[2:])]
    if narrow:
        # The heads: q and k may have different numbers of them, which other dimensions may not.
        names[narrow[-1]] = HEADS  # the innermost dimension that the tables repeat
    tables = []
    for table in shapes[2:]:
        places = range(rank - len(table), rank - 1)
        tables.append((*(names[i] if same(table[i - rank], shapes[0][i]) else None for i in places), None))
    full: Dims = (*names, None)
    return Factoring((full, full, *tables), (full, full), coarse=frozenset({1}), alike={0: 0, 1: 1})


def _cases(samples: Samples) -> Calls:
    heads, angles = samples.normal(2, 3, 5, 16), 6 * samples.uniform(5, 16)
    tables = (angles.cos().to(samples.dtype), angles.sin().to(samples.dtype))
    return {"rotary": (heads, heads, *tables, False, True), "rotary_bwd": (heads, heads, *tables, False)}


register(rotary, "rotary", rule=_rule, kernel="rotary", cases=_cases)
