"""A linear layer, the gradient of whose weight is added where that of the micro-batches before is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from shardcomp.runtime.fsdp import WideGradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: [.., out] of [.., in], [out, in] and [out]. A weight that knows of a `WideGradient` has its gradient
    added up there, by the product that makes it; autograd, and with it `weight.grad`, then does not see it."""
    wide = getattr(weight, "wide_gradient", None)
    if wide is None or not (torch.is_grad_enabled() and weight.requires_grad):
        return functional.linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias, wide)
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, wide: WideGradient) -> Tensor:
        ctx.wide = wide
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        rows = gradients[0].reshape(-1, weight.shape[0])
        of_x = (rows @ weight).view(x.shape) if needs_x else None
        of_weight = ctx.wide.add(rows, x.reshape(-1, weight.shape[1]))
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None
