"""Small calls of every operator, and a comparison of a kernel with the operator's reference on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardcomp.torch_private import tree_leaves, tree_map

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
"""Dtype of a call -> relative and absolute tolerance."""
_WIDTHS = (16, 2056)
"""Widths of rows: one warp takes the first, several warps the second."""


def calls(dtype: torch.dtype = torch.float32, width: int = 16) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Kernel -> operator -> arguments of a small call, for every operator of a kernel, those of the backward included."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    x, y, w, b = drawn(3, 5, width), drawn(3, 5, width), drawn(width), drawn(width)
    moment = torch.rand((3, 5, 1), generator=draw)
    # One label is ignored. The first column below has label 2, as on a later rank of a split vocabulary.
    labels, one = torch.tensor([3, 8, -100, 4, 2]), torch.tensor(1.0)
    rows = (x[0], labels, labels >= 0, 2)
    largest = x[0].float().amax(1)
    normal = (torch.stack((largest, torch.rand(5, generator=draw) + width)), torch.rand(5, generator=draw))
    heads, table = drawn(2, 3, 5, 16), torch.randn((5, 16), generator=draw)
    tables = (table.cos().to(dtype), table.sin().to(dtype))
    weights = [vector.float() for vector in (w, b)]
    copies = [vector.clone() for vector in (w, b)] if dtype.itemsize == 2 else []
    moments, squares = [weight / 9 for weight in weights], [weight.square() for weight in weights]
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
    """Compare `run` with `reference` on the small calls of an operator, those of all kernels or of one.

    Raises:
        AssertionError: the results differ by more than the tolerances.
    """
    for dtype, (relative, absolute) in TOLERANCES.items():
        for width in _WIDTHS:
            for name, arguments in calls(dtype, width).items():
                if operator in arguments and kernel in (None, name):
                    results, expected = (_results(function, arguments[operator], device) for function in (run, reference))
                    torch.testing.assert_close(results, expected, rtol=relative, atol=absolute)


def _results(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> list[Tensor]:
    """The results of a call and its arguments afterwards, some of which it may have overwritten."""
    copies = tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, arguments)
    return [leaf for leaf in tree_leaves((run(*copies), copies)) if isinstance(leaf, Tensor)]
