"""`torch.vmap` under capture, for what transformers does with it: a function of indices, mapped over the dimensions of a mask.

torch.export traces a vmap as a begin and an end with operators between them that do not say their shapes. A function that takes
one number each time is the same function of broadcast tensors, and that is traced as the operators that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_VMAP = torch.vmap


@contextmanager
def broadcast() -> Iterator[None]:
    """Within, a vmap over numbers is broadcasting. Any other is torch's own."""
    # Imported here, since it loads torch._dynamo, which takes a second and a half.
    from shardcomp.torch_private import TransformGetItemToIndex

    # An index that is a number under vmap has no item, so torch has a mode that looks it up otherwise: not needed here.
    plain = patch.object(TransformGetItemToIndex, "__torch_function__", _as_it_is)
    with patch.object(torch, "vmap", _Levels().vmap), plain:
        yield


def _as_it_is(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


class _Levels:
    """The vmaps that are running, one in another. Level i is dimension i of every tensor that stands for a number in them."""

    def __init__(self) -> None:
        self.depth = 0
        self.numbers: dict[int, Tensor] = {}  # by id, and kept, or another tensor might get the id

    def vmap(self, function: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, **options: Any) -> Callable[..., Any]:
        """In place of torch.vmap."""

        def call(*args: Any, **kwargs: Any) -> Any:
            dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
            if kwargs or options or out_dims != 0 or not self._maps_numbers(args, dims):
                return _VMAP(function, in_dims, out_dims, **options)(*args, **kwargs)
            sizes = [arg.shape[0] for arg, dim in zip(args, dims, strict=True) if dim is not None]
            inside = [self._inside(arg, dim) for arg, dim in zip(args, dims, strict=True)]
            self.depth += 1
            try:
                result = function(*inside)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.numbers.clear()
            result = result.reshape((1,) * (self.depth + 1 - result.dim()) + tuple(result.shape))
            return result.expand(*result.shape[: self.depth], sizes[0], *result.shape[self.depth + 1 :])

        return call

    def _maps_numbers(self, args: tuple[Any, ...], dims: tuple[Any, ...]) -> bool:
        """Whether every argument is a tensor, and each that is mapped has one dimension of its own."""
        if len(args) != len(dims) or not all(isinstance(arg, Tensor) for arg in args):
            return False
        mapped = [arg for arg, dim in zip(args, dims, strict=True) if dim is not None]
        return bool(mapped) and all(arg.dim() == 1 and id(arg) not in self.numbers for arg in mapped)

    def _inside(self, arg: Tensor, dim: int | None) -> Tensor:
        """An argument as the function sees it."""
        if dim is not None:
            arg = arg.reshape((1,) * self.depth + (-1,))
        elif id(arg) in self.numbers:
            arg = arg.unsqueeze(-1)
        else:
            return arg
        self.numbers[id(arg)] = arg
        return arg
