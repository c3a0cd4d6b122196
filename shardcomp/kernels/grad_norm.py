"""The squared norm of many gradients, in one pass. The result stays on the device, so that the host waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardcomp.kernels.register import define, register
from shardcomp.kernels.small_cases import Calls, Samples


def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements. It is finite only if every gradient and the sum itself are.

    It is the square of the norm, so that the sums of several ranks can be added before the root is taken.

    Args:
        gradients: floating, of any shapes, on one device.

    Returns:
        [], float32, or float64 if a gradient is float64.

    Raises:
        ValueError: the list is empty, so that it names no device.

    Example:
        >>> import torch
        >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(25.)
    """
    if not gradients:
        raise ValueError("grad_norm: no gradients")
    result: Tensor = torch.ops.shardcomp.grad_norm(gradients)
    return result


def _reference(gradients: list[Tensor]) -> Tensor:
    wide = _wide(gradients)
    return torch.stack([torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients]).square().sum()


def _wide(gradients: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32


define(
    "grad_norm(Tensor[] gradients) -> Tensor",
    _reference,
    lambda gradients: gradients[0].new_empty((), dtype=_wide(gradients)),
)


def _cases(samples: Samples) -> Calls:
    return {"grad_norm": ([samples.rows(), samples.vector()],)}


register(grad_norm, cases=_cases)
