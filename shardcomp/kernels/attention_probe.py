"""Small calls of every kind of attention in a program, which show before anything is allocated whether its provider runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.nodes import value
from shardcomp.ir.program import Program
from shardcomp.kernels.attention import attention

LENGTH = 64
"""The sequence length of a call."""


def small_calls(program: Program, device: torch.device) -> list[Callable[[], Tensor]]:
    """One call for each kind of attention whose provider the policy names, with the heads of one rank."""
    sizes = program.mesh.as_dict()
    calls: dict[Any, Callable[[], Tensor]] = {}
    for node in (node for body in program.bodies() for node in body.calls()):
        if node.target is not attention or "provider" not in node.kwargs:
            continue
        operands = [value(operand) for operand in node.args[:3]]  # type: ignore[arg-type]
        local = [operand.layout.local_shape(operand.shape, sizes) for operand in operands]
        shapes = tuple((int(shape[1]), int(shape[3])) for shape in local)
        tensors = frozenset(name for name, argument in node.kwargs.items() if isinstance(argument, fx.Node))
        options = {k: v for k, v in node.kwargs.items() if k not in tensors and k not in ("dropout", "random")}
        key = (shapes, operands[0].dtype, tensors, tuple(sorted(options.items())))
        calls[key] = functools.partial(_call, device, operands[0].dtype, shapes, tensors, options)
    return list(calls.values())


def _call(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...],
    tensors: frozenset[str],
    options: Mapping[str, Any],
) -> Tensor:
    """shapes: (heads, head size) of q, k, v. tensors: the names of the further tensor arguments."""
    q, k, v = (torch.ones((1, n, LENGTH, d), dtype=dtype, device=device, requires_grad=True) for n, d in shapes)
    positions = torch.arange(LENGTH, device=device).unsqueeze(0)
    arguments = {
        "q_position": positions,
        "k_position": positions,
        "q_segment": positions // 16,
        "k_segment": positions // 16,
        "key_mask": positions >= 0,
        "bias": torch.zeros((1, 1, LENGTH, LENGTH), dtype=dtype, device=device),
        "sinks": torch.zeros(q.shape[1], dtype=dtype, device=device),
    }
    return attention(q, k, v, **{name: arguments[name] for name in tensors}, **options)
