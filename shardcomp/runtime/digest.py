"""Digests of tensors, which show whether ranks have the same numbers without sending them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MULTIPLIER, INCREMENT = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Of Knuth's linear congruential generator. They give neighbouring elements unrelated factors."""
_CHUNK = 1 << 22
"""Elements at a time, so that a digest needs little memory beside the tensor."""
_KNOWN = 1 << 16
"""Up to so many elements, as a batch has, factors are cached."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """A hash of a tensor's values and their order: int64 [], on the tensor's device.

    It is the sum of each element's bits times a factor of its position. Sums wrap around. It reads the tensor once.
    """
    flat = tensor.detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.view(_BITS[flat.element_size()])
    total = torch.full((), flat.numel(), dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        factors = _known_factors if chunk.numel() <= _KNOWN else _factors
        total = total * MULTIPLIER + (chunk.to(torch.int64) * factors(chunk.numel(), chunk.device)).sum()
    return total


def _factors(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=device) * MULTIPLIER + INCREMENT


_known_factors = functools.lru_cache(maxsize=4)(_factors)
