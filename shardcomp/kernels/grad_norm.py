"""The square of the norm of many gradients, in one pass, with nothing waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardcomp.kernels.register import define


def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements: [], float32, or float64 where a gradient is; it is added in that dtype.

    gradients: floating, of any shapes, on one device. What ranks and devices have is added up before the root is taken. The
    result is finite only where every gradient is, and the sum itself. Raises ValueError for an empty list, which names no
    device.
    """
    if not gradients:
        raise ValueError("grad_norm: no gradients")
    found: Tensor = torch.ops.shardcomp.grad_norm(gradients)
    return found


def _reference(gradients: list[Tensor]) -> Tensor:
    wide = _wide(gradients)
    return torch.stack([torch.linalg.vector_norm(each, dtype=wide) for each in gradients]).square().sum()


def _wide(gradients: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(each.dtype == torch.float64 for each in gradients) else torch.float32


define(
    "grad_norm(Tensor[] gradients) -> Tensor",
    _reference,
    lambda gradients: gradients[0].new_empty((), dtype=_wide(gradients)),
)
