"""Matrix products of narrow factors that are summed in a wide dtype, and rounded once or not at all.

On CUDA the GEMM itself writes the wide result (`out_dtype`). On a CPU, BLAS multiplies bf16 factors into a float32 result,
where the library that torch ships can; elsewhere the factors are widened first. CPUs without instructions for bf16 need this
for bf16 results as well: torch's own products take up to seventy times as long there as those of float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shardcomp.torch_private import cpu_multiplies_bf16, dispatch_modes, function_modes


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: [m, k] and [k, n] to [m, n]."""
    if a.dtype == dtype:
        return matmul(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    if dtype == torch.float32 and _takes(a, b):
        result = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
        _gemm(result, a, b, accumulate=False)
        return result
    return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total`: [m, n], [m, k], [k, n]."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif total.dtype == torch.float32 and _takes(a, b) and _leading(total) == (False, total.stride(0)):
        _gemm(total, a, b, accumulate=True)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in their own dtype: [m, k] and [k, n] to [m, n]. out: where the result is written."""
    if is_slow(a):
        result = product(a, b, torch.float32)
        return result.to(a.dtype) if out is None else out.copy_(result)
    return torch.mm(a, b, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias in their own dtype: [.., out] of [.., in], [out, in] and [out]. No gradient flows."""
    if not is_slow(x):
        return functional.linear(x, weight, bias)
    result = product(x.reshape(-1, x.shape[-1]), weight.t(), torch.float32)
    if bias is not None:
        result += bias
    return result.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def is_slow(x: Tensor) -> bool:
    """Whether torch's own products of a tensor of this dtype and device are slower than those of float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _BF16_IS_SLOW


_BF16_IS_SLOW = not cpu_multiplies_bf16()
"""Whether the CPU lacks instructions for bf16, so that torch computes its products without a library."""


# BLAS ---------------------------------------------------------------------------------------------------------------------

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_NAME = "cblas_gemm_bf16bf16f32"


@cache
def _blas() -> Callable[..., Any] | None:
    """BLAS's product of bf16 matrices in float32, from the library that torch ships; None where that has none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function: Any = getattr(ctypes.CDLL(str(folder / name)), _NAME)
        except (OSError, AttributeError):
            continue
        size, number, matrix = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        function.argtypes = [*[size] * 6, number, matrix, size, matrix, size, number, matrix, size]
        function.restype = None
        return function  # type: ignore[no-any-return]
    return None


def _takes(a: Tensor, b: Tensor) -> bool:
    """Whether BLAS multiplies these."""
    # A trace and a fake tensor have no memory to point at, and autograd does not see the call. An empty sum is left to torch.
    if torch.compiler.is_compiling() or not (type(a) is type(b) is Tensor):
        return False
    # A mode, such as a counter of flops, would not see it either.
    if dispatch_modes() or function_modes():
        return False
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return False
    plain = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0 for x in (a, b))
    return plain and _blas() is not None


def _leading(x: Tensor) -> tuple[bool, int] | None:
    """Whether a matrix is a transposed view, and the distance of its rows (columns, if it is); None for any other strides."""
    rows, columns = x.shape
    if x.stride(1) == 1 and x.stride(0) >= columns:
        return False, x.stride(0)
    if x.stride(0) == 1 and x.stride(1) >= rows:
        return True, x.stride(1)
    return None


def _gemm(total: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """total (+)= a @ b."""
    blas = _blas()
    assert blas is not None
    operands: list[Any] = []
    layouts: list[int] = []
    for x in (a, b):
        leading = _leading(x)
        if leading is None:
            x = x.contiguous()
            leading = (False, x.shape[1])
        transposed, distance = leading
        layouts.append(_TRANSPOSED if transposed else _AS_IT_IS)
        operands.append((x, distance))
    (a, a_distance), (b, b_distance) = operands
    sizes = (a.shape[0], b.shape[1], a.shape[1])
    factors = (a.data_ptr(), a_distance, b.data_ptr(), b_distance)
    blas(_ROW_MAJOR, *layouts, *sizes, 1.0, *factors, float(accumulate), total.data_ptr(), total.stride(0))
