"""A linear layer whose backward accumulates in place: the weight's gradient into its `main_grad`, the input's gradient into
the one that all layers reading this input share."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shardcomp.kernels import wide_matmul
from shardcomp.kernels.wide_matmul import add_product, is_slow, matmul, product


class Accumulator(Protocol):
    """What a linear layer needs of a `MainGrad`."""

    @property
    def weight(self) -> Tensor: ...

    def add(self, grad_output: Tensor, x: Tensor) -> Tensor | None: ...


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: [.., out] of [.., in], [out, in] and [out].

    A weight with the attribute `main_grad` accumulates its gradient there, and autograd does not see it. An `x` returned by
    `fan_out` accumulates its gradient there.
    """
    main_grad, joint = getattr(weight, "main_grad", None), getattr(x, "joint_gradient", None)
    if not torch.is_grad_enabled():
        return wide_matmul.linear(x, weight, bias)
    if (main_grad is None or not weight.requires_grad) and joint is None:
        # torch's own, also where it is slow: under a split backward its two halves compute what each needs, and no more.
        return functional.linear(x, weight, bias)
    # The gradient goes to the gathered leaf directly. The views between would get a tensor of zeros where it is None.
    leaf = weight if main_grad is None else main_grad.weight
    result: Tensor = _Linear.apply(x, weight.detach(), bias, leaf, main_grad, joint)
    return result


def fan_out(x: Tensor) -> Tensor:
    """`x` itself, for several linear layers to read."""
    joint = _JointGradient()
    result: Tensor = _FanOut.apply(x, joint)
    result.joint_gradient = joint  # type: ignore[attr-defined]
    return result


class _JointGradient:
    """The sum of the gradients that several layers have for their common input, so far in this backward."""

    sum: Tensor | None = None

    def add(self, grad_output: Tensor, weight: Tensor) -> None:
        """Add one layer's gradient, `grad_output` weight: [rows, in] of [rows, out] and [out, in]."""
        if self.sum is None:
            # Where a narrow product is made of a wide one anyway, the sum stays wide until it is complete.
            dtype = torch.float32 if is_slow(grad_output) else grad_output.dtype
            self.sum = product(grad_output, weight, dtype)
        else:
            add_product(self.sum, grad_output, weight)


class _FanOut(torch.autograd.Function):
    """The identity. Autograd runs its backward after the backwards of all readers, so the joint gradient is complete there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joint: _JointGradient) -> Tensor:
        ctx.joint, ctx.shape, ctx.dtype = joint, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        of_others, joint = gradients[0], ctx.joint.sum  # readers that are no `linear` arrive through autograd
        ctx.joint.sum = None
        if joint is None:
            return of_others, None
        joint = joint.to(ctx.dtype).view(ctx.shape)
        return joint if of_others is None else of_others + joint, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        main_grad: Accumulator | None,
        joint: _JointGradient | None,
    ) -> Tensor:
        ctx.main_grad, ctx.joint = main_grad, joint
        ctx.save_for_backward(x, weight)
        return wide_matmul.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, needs_weight, *_ = ctx.needs_input_grad
        grad_output = gradients[0].reshape(-1, weight.shape[0])
        grad_x = grad_weight = None
        if needs_x and ctx.joint is not None:
            ctx.joint.add(grad_output, weight)
        elif needs_x:
            grad_x = matmul(grad_output, weight).view(x.shape)
        if needs_weight:
            rows = x.reshape(-1, weight.shape[1])
            grad_weight = matmul(grad_output.t(), rows) if ctx.main_grad is None else ctx.main_grad.add(grad_output, rows)
        return grad_x, None, grad_output.sum(0) if needs_bias else None, grad_weight, None, None
