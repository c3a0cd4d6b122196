"""Digests of tensors, by which ranks see whether they have the same numbers without sending them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MULTIPLIER, INCREMENT = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Of Knuth's linear congruential generator: what neighbouring places of a tensor are weighed by has nothing in common."""
_CHUNK = 1 << 22
"""Numbers at a time: what a digest needs beside the tensor stays small."""
_KNOWN = 1 << 16
"""Up to so many numbers, as a batch has, factors are kept from one step to the next."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """A number that another value, or the same values in another order, change: int64 [], on the tensor's device.

    The bits of each number times a factor of its place, summed; sums wrap around. Its cost is one read of the tensor.
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
