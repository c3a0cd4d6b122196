"""RMS norm (Zhang and Sennrich, https://arxiv.org/abs/1910.07467) over the last dimension.

The backward reads the input and one number per row; it computes the normalised values again instead of saving them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.nodes import tensor_arguments, value
from shardcomp.ir.program import Value
from shardcomp.kernels.register import define, differentiate, register, summed_rows, widened
from shardcomp.kernels.small_cases import Calls, Samples
from shardcomp.sharding.notation import Dims
from shardcomp.sharding.rules import Factoring


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0, round_first: bool = False) -> Tensor:
    """x / √(mean(x²) + eps) · (offset + weight), the mean over the last dimension.

    Computed in float32, or in float64 if `x` is float64.

    Args:
        x: [.., h] floating.
        weight: [h] floating, or None for no product.
        eps: added to the mean of the squares.
        offset: added to the weight; some models have 1.
        round_first: round the normalised values to the dtype of `x` before the product with the weight, and the product again,
            as LLaMA does; else round the product alone.

    Returns:
        [.., h], contiguous, in the dtype of `x`.

    Raises:
        RuntimeError: `x` has no dimension, or the size of `weight` is not h (by the compiled kernel).

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
        tensor([[0.8485, 2.2627]])
    """
    return torch.ops.shardcomp.rms_norm(x, weight, eps, offset, round_first)[0]


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / √(mean + eps) of each row: [.., 1] in float32, or float64 if `x` is float64."""
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
    """The gradients of x and of the weight (empty without one), each rounded once.

    added: a further gradient of x, that of a residual stream.
    """
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
    """The sharding rule of a norm over the last dimension: all others may be split, alike in operands and results."""
    operands = [value(operand).shape for operand in tensor_arguments(node)]
    results = 1 if isinstance(node.meta["value"], Value) else len(node.meta["value"])
    names: Dims = (*(f"d{i}" for i in range(len(operands[0]) - 1)), None)
    weight: Dims = (None,)
    return Factoring(tuple(weight if len(shape) == 1 else names for shape in operands), (names,) * results)


def _variants(eps: float, constants: Sequence[float], vectors: int) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """With one vector or none; an offset where the subgraph adds 1, and both ways to round."""
    for offset in (0.0, 1.0) if vectors and 1.0 in constants else (0.0,):
        for first in (False, True) if vectors else (False,):
            options = {"offset": offset, "round_first": first}
            if vectors < 2:
                yield tuple(range(vectors)), {"eps": eps, **{name: option for name, option in options.items() if option}}


def _cases(samples: Samples) -> Calls:
    x, y, weight, rstd = samples.rows(), samples.rows(), samples.vector(), samples.uniform(3, 5, 1)
    return {"rms_norm": (x, weight, 1e-5, 0.0, True), "rms_norm_bwd": (y, None, x, weight, rstd, 0.0)}


register(rms_norm, "norm", rule=rows, kernel="rms_norm", variants=_variants, cases=_cases)
