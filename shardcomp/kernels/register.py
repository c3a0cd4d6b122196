"""How a fused operator is made: a schema, a reference in plain PyTorch, and the shapes of its results.

The reference is the operator's specification and what runs where nothing better is registered; the library that `library.py`
loads registers operators of the same names for the CPU and takes their place there, in graphs that exist already as well. For
other devices `device_check.py` does so, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardcomp.kernels import device_check

LIBRARY = torch.library.Library("shardcomp", "FRAGMENT")
_WAITING = [torch.library.Library(space, "FRAGMENT") for space in device_check.SPACES.values()]
REFERENCES: dict[str, Callable[..., Any]] = {}
"""Operator -> its reference, which runs whatever library there is."""


def define(schema: str, reference: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Make `torch.ops.shardcomp.<name>` of its schema, `name(arguments) -> results`. shapes: what it gives on fake tensors."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    REFERENCES[name] = reference
    for waiting in _WAITING:
        waiting.define(schema)

    def first(*arguments: Any) -> Any:
        """What runs until there is a library, and then where it has no such operator."""
        device = next(each.device for each in _flat(arguments) if isinstance(each, Tensor))
        if device_check.in_place(name, device, reference):
            return getattr(torch.ops.shardcomp, name).default(*arguments)
        return reference(*arguments)

    LIBRARY.impl(name, first, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardcomp::{name}", shapes, lib=LIBRARY)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    """The arguments, and of those that are lists their elements."""
    for each in arguments:
        yield from each if isinstance(each, list | tuple) else (each,)


def differentiate(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
    """Give an operator its gradient. save(ctx, inputs, output) keeps what `backward(ctx, *gradients)` needs."""
    torch.library.register_autograd(f"shardcomp::{name}", backward, setup_context=save, lib=LIBRARY)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype that operators compute in: float32, or float64 where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summed_rows(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last."""
    return (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)).sum(0)


def laid_out(made: Tensor, like: Tensor) -> Tensor:
    """`made`, with the strides that `torch.empty_like(like)` has."""
    wanted = torch.empty_like(like)
    return made if made.stride() == wanted.stride() else wanted.copy_(made)
