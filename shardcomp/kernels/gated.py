"""The product of an activated gate and another tensor, the inner part of a gated MLP (https://arxiv.org/abs/2002.05202).

The backward saves gate and up alone and computes the activation again: to save it would cost a further tensor of their size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardcomp.kernels.register import define, differentiate, laid_out, register, widened
from shardcomp.kernels.small_cases import Calls, Cases, Samples
from shardcomp.sharding.rules import pointwise

aten = torch.ops.aten


def swiglu(gate: Tensor, up: Tensor, *, round_first: bool = False) -> Tensor:
    """silu(gate) · up.

    Args:
        gate: [..] floating.
        up: the shape and dtype of `gate`.
        round_first: round silu(gate) to the dtype before the product, as HuggingFace's models do; else compute in float32
            (float64 for float64) and round once.

    Returns:
        The shape and dtype of `gate`.

    Example:
        >>> import torch
        >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    return torch.ops.shardcomp.gated(gate, up, "silu", round_first)


def geglu(gate: Tensor, up: Tensor, *, tanh: bool = False, round_first: bool = False) -> Tensor:
    """gelu(gate) · up.

    Args:
        gate: [..] floating.
        up: the shape and dtype of `gate`.
        tanh: approximate gelu with a tanh.
        round_first: as in `swiglu`.

    Returns:
        The shape and dtype of `gate`.

    Example:
        >>> import torch
        >>> geglu(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]))
        tensor([0.0000, 1.6827])
    """
    return torch.ops.shardcomp.gated(gate, up, "gelu_tanh" if tanh else "gelu", round_first)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "gelu_tanh": lambda gradient, x: aten.gelu_backward(gradient, x, approximate="tanh"),
}


def _forward(gate: Tensor, up: Tensor, activation: str, round_first: bool) -> Tensor:
    inner, other = (gate, up) if round_first else (widened(gate), widened(up))
    return laid_out((_ACTIVATIONS[activation](inner) * other).to(gate.dtype), gate)


def _back(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, each rounded once."""
    wide, inner = widened(gradient), widened(gate)
    of_gate = _BACKWARDS[activation](wide * widened(up), inner).to(gate.dtype)
    return laid_out(of_gate, gate), laid_out((wide * _ACTIVATIONS[activation](inner)).to(up.dtype), up)


def _shapes(gate: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate)


def _shapes_back(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, _ = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.shardcomp.gated_bwd(gradient, *ctx.saved_tensors, ctx.activation), None, None


define("gated(Tensor gate, Tensor up, str activation, bool round_first) -> Tensor", _forward, _shapes)
define("gated_bwd(Tensor gradient, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)", _back, _shapes_back)
differentiate("gated", _backward, _save)


def _cases(activation: str) -> Cases:
    def cases(samples: Samples) -> Calls:
        x, y = samples.rows(), samples.rows()
        return {"gated": (x, y, activation, True), "gated_bwd": (y, x, y, activation)}

    return cases


register(swiglu, "gated", rule=pointwise, kernel="swiglu", variants=lambda: [{}], cases=_cases("silu"))
register(geglu, "gated", rule=pointwise, kernel="geglu", variants=lambda: [{}, {"tanh": True}], cases=_cases("gelu"))
