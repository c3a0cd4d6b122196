"""Small calls of every operator, and a comparison of a kernel with the operator's reference on them.

The calls of a kernel are made by its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardcomp.ir.operators import FAMILIES
from shardcomp.torch_private import tree_leaves, tree_map

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
"""Dtype of a call -> relative and absolute tolerance."""
_WIDTHS = (16, 2056)
"""Widths of rows: one warp takes the first, several warps the second."""


class Samples:
    """Random tensors of one dtype, the same for every kernel. Most have rows of `width` numbers."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.width = dtype, width
        self.draw = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Numbers around zero, in the dtype of the samples."""
        return torch.randn(shape, generator=self.draw).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1, in float32."""
        return torch.rand(shape, generator=self.draw)

    def rows(self) -> Tensor:
        """[3, 5, width], like activations."""
        return self.normal(3, 5, self.width)

    def vector(self) -> Tensor:
        """[width], like a weight of a norm."""
        return self.normal(self.width)


Calls = dict[str, tuple[Any, ...]]
"""Operator -> the arguments of a small call."""
Cases = Callable[[Samples], Calls]
"""Makes a small call of every operator of a kernel, those of the backward included."""
_cases: dict[str, tuple[int, Cases]] = {}
"""Kernel -> the place of its family, and its calls."""


def add(kernel: str, family: str, cases: Cases) -> None:
    """Add the calls of a kernel."""
    _cases[kernel] = list(FAMILIES).index(family), cases


def calls(dtype: torch.dtype = torch.float32, width: int = 16) -> dict[str, Calls]:
    """Kernel -> its small calls, in the order of families."""
    ordered = sorted(_cases.items(), key=lambda item: item[1][0])
    return {kernel: cases(Samples(dtype, width)) for kernel, (_, cases) in ordered}


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
