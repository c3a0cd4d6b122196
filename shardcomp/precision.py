"""The dtype that a precision computes in; and float64 runs in which no cast of the model makes anything narrower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardcomp.errors import PolicyError

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("float", "half", "bfloat16")
_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that a forward computes in. Raises PolicyError for a precision that does not exist."""
    if precision not in _COMPUTE:
        raise PolicyError(f"precision = {precision!r}: use one of {', '.join(_COMPUTE)}")
    return _COMPUTE[precision]


class Widened(TorchFunctionMode):
    """A cast to float32, float16 or bfloat16 of a tensor that is not float32 gives float64 instead.

    HuggingFace's models compute norms, rotary tables and losses in float32, whatever their dtype. Under this mode such islands
    are float64 in a float64 model. What is computed in float32 from the start, such as a rotary buffer, stays so: only casts of
    other tensors are widened.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` with every narrow dtype among its arguments widened."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype != torch.float32:
            if getattr(func, "__name__", "") in _CASTS:
                return args[0].to(torch.float64)
            args = tuple(_widen(argument) for argument in args)
            kwargs = {key: _widen(argument) for key, argument in kwargs.items()}
        return func(*args, **kwargs)


def _widen(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument
