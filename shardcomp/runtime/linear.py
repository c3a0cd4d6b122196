"""A linear layer whose gradients are added where others are already, by the products that make them: that of its weight to that
of the micro-batches before, that of its input to those of the other layers that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from shardcomp.runtime.fsdp import MainGrad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: [.., out] of [.., in], [out, in] and [out].

    A weight that knows of a `WideGradient` has its gradient added up there; autograd then does not see it. An `x` that comes
    from `fan_out` has its gradient added up there.
    """
    wide, joint = getattr(weight, "wide_gradient", None), getattr(x, "joint_gradient", None)
    if (wide is None or not weight.requires_grad) and joint is None or not torch.is_grad_enabled():
        return functional.linear(x, weight, bias)
    # A gradient is given to the leaf itself: what lies between would be given zeros where there is none.
    leaf = weight if wide is None else wide.weight
    made: Tensor = _Linear.apply(x, weight.detach(), bias, leaf, wide, joint)
    return made


def fan_out(x: Tensor) -> Tensor:
    """`x` itself, for several linear layers to read."""
    joint = _JointGradient()
    made: Tensor = _FanOut.apply(x, joint)
    made.joint_gradient = joint  # type: ignore[attr-defined]
    return made


class _JointGradient:
    """The gradients of what several layers read, as far as these have come in a backward."""

    sum: Tensor | None = None

    def add(self, of_results: Tensor, weight: Tensor) -> None:
        """Add that of one layer: `of_results` weight, [rows, in] of [rows, out] and [out, in]."""
        if self.sum is None:
            self.sum = of_results @ weight
        else:
            self.sum.addmm_(of_results, weight)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: _JointGradient) -> Tensor:
        ctx.joint, ctx.shape = joint, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        of_others, joint = gradients[0], ctx.joint.sum
        ctx.joint.sum = None
        if joint is None:
            return of_others, None
        joint = joint.view(ctx.shape)
        return joint if of_others is None else of_others + joint, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        wide: MainGrad | None,
        joint: _JointGradient | None,
    ) -> Tensor:
        ctx.wide, ctx.joint = wide, joint
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_weight, *_ = ctx.needs_input_grad
        rows = gradients[0].reshape(-1, weight.shape[0])
        of_x = of_weight = None
        if needs_x and ctx.joint is not None:
            ctx.joint.add(rows, weight)
        elif needs_x:
            of_x = (rows @ weight).view(x.shape)
        if needs_weight:
            columns = x.reshape(-1, weight.shape[1])
            of_weight = rows.t() @ columns if ctx.wide is None else ctx.wide.add(rows, columns)
        return of_x, None, rows.sum(0) if needs_bias else None, of_weight, None, None
