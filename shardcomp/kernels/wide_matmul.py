"""Matrix products whose result has a wider dtype than the factors, without rounding to the narrow one in between.

On CUDA the GEMM itself writes the wide result (`out_dtype`); elsewhere the factors are widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: [m, k] and [k, n] to [m, n]."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of `total`: [m, n], [m, k], [k, n]."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
