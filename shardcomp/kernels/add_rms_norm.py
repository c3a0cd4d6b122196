"""A residual addition and the RMS norm of the sum.

Fused, the sum is written once and not read again by the norm. The backward of both reads the sum once and writes one gradient,
since x and residual have the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardcomp.kernels import rms_norm as norm
from shardcomp.kernels.register import define, differentiate, register
from shardcomp.kernels.small_cases import Calls, Samples


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual, weight)` and `x + residual`, which is rounded to its dtype before the norm.

    Args:
        x: [.., h] floating.
        residual: [.., h], the shape and dtype of `x`.
        weight, eps, offset, round_first: as in `rms_norm`.

    Returns:
        The norm and the sum: [.., h] each, contiguous, in the dtype of `x`.

    Example:
        >>> import torch
        >>> normal, total = add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), eps=0.0)
        >>> normal, total
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    results = torch.ops.shardcomp.add_rms_norm(x, residual, weight, eps, offset, round_first)
    return results[0], results[1]


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    normal, rstd = norm.forward(total, weight, eps, offset, round_first)
    return normal, total, rstd


def _shapes(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.offset, _ = inputs
    ctx.set_materialize_grads(False)  # either result may be unused; None then saves a tensor of zeros
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


def _cases(samples: Samples) -> Calls:
    x, y, weight, rstd = samples.rows(), samples.rows(), samples.vector(), samples.uniform(3, 5, 1)
    return {"add_rms_norm": (x, y, weight, 1e-5, 0.0, True), "rms_norm_bwd": (y, x, x, weight, rstd, 0.0)}


register(add_rms_norm, "norm", rule=norm.rows, kernel="add_rms_norm", cases=_cases)
