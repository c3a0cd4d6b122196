"""Layer norm over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardcomp.kernels.register import define, differentiate, summed_rows, widened
from shardcomp.kernels.rms_norm import rows
from shardcomp.sharding.rules import RULES, Rule


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, stepwise: bool = False
) -> Tensor:
    """(x - mean(x)) / √(variance(x) + eps) · weight + bias, moments over the last dimension, of all its elements.

    x: [.., h] floating. weight, bias: [h], each may be missing. Computed in float32, or float64 for such `x`, and rounded once.
    stepwise: the last bits are those of the mean, the mean of the squared deviations, and products one after the other; else
    those of torch's own operator. Result: [.., h], contiguous, in the dtype of `x`.
    """
    return torch.ops.shardcomp.layer_norm(x, weight, bias, eps, stepwise)[0]


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, stepwise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = widened(x)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if stepwise:
        made = centred * rstd
        made = made if weight is None else made * widened(weight)
        made = (made if bias is None else made + widened(bias)).to(x.dtype)
    else:
        made = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return made.contiguous(), mean.contiguous(), rstd.contiguous()


def _back(
    gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (empty without one), each rounded once."""
    wide, normal = widened(gradient), (widened(x) - mean) * rstd
    of_weight = x.new_empty(0) if weight is None else summed_rows(wide * normal).to(weight.dtype)
    of_bias = x.new_empty(0) if bias is None else summed_rows(wide).to(bias.dtype)
    if weight is not None:
        wide = wide * widened(weight)
    along = normal * (wide * normal).mean(-1, keepdim=True)
    return ((wide - wide.mean(-1, keepdim=True) - along) * rstd).to(x.dtype).contiguous(), of_weight, of_bias


def _shapes(x: Tensor, weight: Any, bias: Any, eps: float, stepwise: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    moment = x.new_empty((*x.shape[:-1], 1), dtype=wide)
    return x.new_empty(x.shape), moment, torch.empty_like(moment)


def _shapes_back(gradient: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Any:
    return x.new_empty(x.shape), *(x.new_empty(0) if held is None else held.new_empty(held.shape) for held in (weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    made = torch.ops.shardcomp.layer_norm_bwd(gradient, x, weight, bias, mean, rstd)
    return made[0], None if weight is None else made[1], None if bias is None else made[2], None, None


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool stepwise) -> (Tensor, Tensor, Tensor)",
    _forward,
    _shapes,
)
define(
    "layer_norm_bwd(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _back,
    _shapes_back,
)
differentiate("layer_norm", _backward, _save)
RULES[layer_norm] = Rule(function=rows)
