"""Small calls of every operator, and whether a kernel gives on them what the operator's reference gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
"""Relative and absolute, by the dtype that an operator is called with."""
_WIDTHS = (16, 2056)
"""What one warp goes through, and what takes several."""


def calls(dtype: torch.dtype = torch.float32, width: int = 16) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Kernel -> a small call of each operator that it is made of, the backward's among them: operator -> arguments."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    x, y, w, b = drawn(3, 5, width), drawn(3, 5, width), drawn(width), drawn(width)
    moment = torch.rand((3, 5, 1), generator=draw)
    labels, one = torch.tensor([3, 8, -100, 4, 2]), torch.tensor(1.0)
    rows = (x[0], labels, labels >= 0, 2)
    largest = x[0].float().amax(1)
    normal = (torch.stack((largest, torch.rand(5, generator=draw) + width)), torch.rand(5, generator=draw))
    heads, table = drawn(2, 3, 5, 16), torch.randn((5, 16), generator=draw)
    tables = (table.cos().to(dtype), table.sin().to(dtype))
    weights = [held.float() for held in (w, b)]
    copies = [held.clone() for held in (w, b)] if dtype.itemsize == 2 else []
    moments, squares = [held / 9 for held in weights], [held.square() for held in weights]
    steps = [one.clone(), one.clone()]
    return {
        "rms_norm": {"rms_norm": (x, w, 1e-5, 0.0, True), "rms_norm_bwd": (y, None, x, w, moment, 0.0)},
        "add_rms_norm": {"add_rms_norm": (x, y, w, 1e-5, 0.0, True), "rms_norm_bwd": (y, x, x, w, moment, 0.0)},
        "layer_norm": {"layer_norm": (x, w, b, 1e-5, False), "layer_norm_bwd": (y, x, w, b, moment, moment)},
        "rotary": {
            "rotary": (heads, heads, *tables, False, True),
            "rotary_bwd": (heads, heads, *tables, False),
        },
        "swiglu": {"gated": (x, y, "silu", True), "gated_bwd": (y, x, y, "silu")},
        "geglu": {"gated": (x, y, "gelu", True), "gated_bwd": (y, x, y, "gelu")},
        "cross_entropy": {"cross_entropy_statistics": rows, "cross_entropy_gradient": (*rows[:3], *normal, 2)},
        "linear_cross_entropy": {"cross_entropy_statistics": rows, "cross_entropy_gradient_": (*rows[:3], *normal, 2)},
        "adamw": {
            "adamw_": (
                *(weights, copies, [b, w], moments, squares, steps),
                *(one.double() / 9, 0.9, 0.95, 1e-8, 0.1, False, one / 3, None),
            )
        },
        "grad_norm": {"grad_norm": ([x, w],)},
    }


def compare(
    operator: str, run: Callable[..., Any], reference: Callable[..., Any], device: torch.device, kernel: str | None = None
) -> None:
    """Call both on every small call of an operator, of all kernels or of one. Raises AssertionError where they differ."""
    for dtype, (relative, absolute) in TOLERANCES.items():
        for width in _WIDTHS:
            for name, each in calls(dtype, width).items():
                if operator in each and kernel in (None, name):
                    made, expected = (_results(function, each[operator], device) for function in (run, reference))
                    torch.testing.assert_close(made, expected, rtol=relative, atol=absolute)


def _results(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> list[Tensor]:
    """What a call returns and what it leaves of its arguments, some of which it may have written over."""
    given = tree_map(lambda held: held.to(device, copy=True) if isinstance(held, Tensor) else held, arguments)
    return [each for each in tree_leaves((run(*given), given)) if isinstance(each, Tensor)]
