"""A residual addition and the RMS norm of the sum, which is written once and read by the backward of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardcomp.kernels import rms_norm as norm
from shardcomp.kernels.register import define, differentiate
from shardcomp.sharding.rules import RULES, Rule


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual, weight)` and `x + residual`, rounded to their dtype before it is normalised.

    x, residual: [.., h], of one shape and dtype. The rest is that of `rms_norm`. Results: [.., h] each, contiguous, the norm
    first.
    """
    made = torch.ops.shardcomp.add_rms_norm(x, residual, weight, eps, offset, round_first)
    return made[0], made[1]


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    made, rstd = norm.forward(total, weight, eps, offset, round_first)
    return made, total, rstd


def _shapes(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.offset, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], weight, output[2])


def _backward(ctx: Any, gradient: Tensor | None, added: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    if gradient is None:
        return added, added, None, None, None, None
    of_sum, of_weight = torch.ops.shardcomp.rms_norm_bwd(gradient, added, total, weight, rstd, ctx.offset)
    return of_sum, of_sum, None if weight is None else of_weight, None, None, None


define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool round_first) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _shapes,
)
differentiate("add_rms_norm", _backward, _save)
RULES[add_rms_norm] = Rule(function=norm.rows)
