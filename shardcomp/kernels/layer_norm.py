"""Layer norm (Ba, Kiros and Hinton, https://arxiv.org/abs/1607.06450) over the last dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardcomp.kernels.register import define, differentiate, register, summed_rows, widened
from shardcomp.kernels.rms_norm import rows
from shardcomp.kernels.small_cases import Calls, Samples


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float, stepwise: bool = False
) -> Tensor:
    """(x - mean(x)) / √(variance(x) + eps) · weight + bias, with the moments of the last dimension.

    Computed in float32, or in float64 if `x` is float64, and rounded once. The variance divides by h, not by h - 1.

    Args:
        x: [.., h] floating.
        weight: [h] floating, or None.
        bias: [h] floating, or None.
        eps: added to the variance.
        stepwise: the bits of a norm that is written out in single operators (as Cohere's is): the mean, the mean of the squared
            deviations, then each product and sum; else the bits of torch's own operator.

    Returns:
        [.., h], contiguous, in the dtype of `x`.

    Raises:
        RuntimeError: `x` has no dimension, or the size of `weight` or `bias` is not h (by the compiled kernel).

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), bias=torch.tensor([0.0, 1.0]), eps=0.0)
        tensor([[-1.,  2.]])
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
        result = centred * rstd
        result = result if weight is None else result * widened(weight)
        result = (result if bias is None else result + widened(bias)).to(x.dtype)
    else:
        result = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return result.contiguous(), mean.contiguous(), rstd.contiguous()


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
    return x.new_empty(x.shape), *(
        x.new_empty(0) if vector is None else vector.new_empty(vector.shape) for vector in (weight, bias)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    of_x, of_weight, of_bias = torch.ops.shardcomp.layer_norm_bwd(gradient, x, weight, bias, mean, rstd)
    return of_x, None if weight is None else of_weight, None if bias is None else of_bias, None, None


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


def _variants(eps: float, constants: Sequence[float], vectors: int) -> Iterator[tuple[tuple[int | None, ...], dict[str, Any]]]:
    """Every way to take the vectors as weight and bias, each rounded once and at every step."""
    orders: dict[int, list[tuple[int | None, ...]]] = {0: [()], 1: [(0,), (None, 0)], 2: [(0, 1), (1, 0)]}
    for order in orders[vectors]:
        yield order, {"eps": eps}
        yield order, {"eps": eps, "stepwise": True}


def _cases(samples: Samples) -> Calls:
    x, y, weight, bias = samples.rows(), samples.rows(), samples.vector(), samples.vector()
    moment = samples.uniform(3, 5, 1)
    return {"layer_norm": (x, weight, bias, 1e-5, False), "layer_norm_bwd": (y, x, weight, bias, moment, moment)}


register(layer_norm, "norm", rule=rows, kernel="layer_norm", variants=_variants, cases=_cases)
