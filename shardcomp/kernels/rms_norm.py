"""RMS norm over the last dimension. Its backward reads the input and one number per row, not the normalised values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.program import Value, tensor_arguments, value
from shardcomp.kernels.register import define, differentiate, summed_rows, widened
from shardcomp.sharding.rules import RULES, Dims, Factoring, Rule


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0, round_first: bool = False) -> Tensor:
    """x / √(mean(x²) + eps) · (offset + weight), the mean over the last dimension.

    x: [.., h] floating. weight: [h]; without it nothing is multiplied. Computed in float32, or float64 for such `x`.
    round_first: the normalised values are rounded to the dtype of `x` before they meet the weight, and their product again;
    else the product alone is rounded. Result: [.., h], contiguous, in the dtype of `x`.
    """
    return torch.ops.shardcomp.rms_norm(x, weight, eps, offset, round_first)[0]


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """The norm, and the factor of each row: [.., 1] in float32, or float64 for such `x`."""
    wide = widened(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * rstd
    if weight is not None:
        normal, factor = (normal.to(x.dtype), weight) if round_first else (normal, widened(weight))
        normal = normal * (factor if offset == 0 else factor + offset)
    return normal.to(x.dtype).contiguous(), rstd.contiguous()


def backward(
    gradient: Tensor, added: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight (empty without one), each rounded once. added: a further gradient of x."""
    wide, normal = widened(gradient), widened(x) * rstd
    of_weight = x.new_empty(0) if weight is None else summed_rows(wide * normal).to(weight.dtype)
    if weight is not None:
        wide = wide * (widened(weight) + offset)
    of_x = (wide - normal * (wide * normal).mean(-1, keepdim=True)) * rstd
    return (of_x if added is None else of_x + added).to(x.dtype).contiguous(), of_weight


def _shapes(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _shapes_back(gradient: Tensor, added: Any, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float) -> Any:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    of_x, of_weight = torch.ops.shardcomp.rms_norm_bwd(gradient, None, x, weight, rstd, ctx.offset)
    return of_x, None if weight is None else of_weight, None, None, None


define("rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool round_first) -> (Tensor, Tensor)", forward, _shapes)
define(
    "rms_norm_bwd(Tensor gradient, Tensor? added, Tensor x, Tensor? weight, Tensor rstd, float offset) -> (Tensor, Tensor)",
    backward,
    _shapes_back,
)
differentiate("rms_norm", _backward, _save)


def rows(node: fx.Node) -> Factoring:
    """A norm over the last dimension: the others may be cut, alike in all operands that have them and in all results."""
    operands = [value(operand).shape for operand in tensor_arguments(node)]
    results = 1 if isinstance(node.meta["value"], Value) else len(node.meta["value"])
    names: Dims = (*(f"d{i}" for i in range(len(operands[0]) - 1)), None)
    weight: Dims = (None,)
    return Factoring(tuple(weight if len(shape) == 1 else names for shape in operands), (names,) * results)


RULES[rms_norm] = Rule(function=rows)
