"""The dtype that a precision computes in; and float64 runs in which no cast of the model makes anything narrower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardcomp.errors import PolicyError
from shardcomp.torch_private import tree_leaves

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = ("float", "half", "bfloat16")
_FLOATING = {torch.ones, torch.zeros, torch.empty, torch.eye, torch.linspace, torch.rand, torch.randn}
_FROM_NUMBERS = {torch.tensor, torch.full, torch.arange}
"""What makes a tensor of the default dtype unless its arguments name one: always, or where a number among them is a float."""
COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
"""The dtype that a forward computes in, by precision."""
MASTER = {"bf16": torch.float32, "fp32": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
"""The dtype that parameters, gradients and reductions have, by precision."""


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that a forward computes in. Raises PolicyError for a precision that does not exist."""
    if precision not in COMPUTE:
        raise PolicyError(f"precision = {precision!r}: use one of {', '.join(COMPUTE)}")
    return COMPUTE[precision]


class Widened(TorchFunctionMode):
    """A cast to float32, float16 or bfloat16 gives float64 instead, and so does a tensor that is made in one of them.

    HuggingFace's models compute norms, rotary tables, position slopes and losses in float32, whatever their dtype. Under this
    mode such islands are float64 in a float64 model. A float32 tensor that exists already is left alone until it is cast.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` with every narrow dtype among its arguments widened."""
        kwargs = kwargs or {}
        # x.float() casts without a dtype among its arguments.
        if getattr(func, "__name__", "") in _CASTS and args and isinstance(args[0], Tensor):
            return args[0].to(torch.float64)
        args = tuple(_widen(argument) for argument in args)
        kwargs = {key: _widen(argument) for key, argument in kwargs.items()}
        # These take torch's default dtype where none is given: float32, also in a float64 model.
        if "dtype" not in kwargs and (func in _FLOATING or func in _FROM_NUMBERS and _has_float((args, kwargs))):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _widen(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument


def _has_float(arguments: Any) -> bool:
    return any(isinstance(leaf, (float, torch.SymFloat)) for leaf in tree_leaves(arguments))
