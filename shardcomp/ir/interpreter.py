"""Runs a Program of one unit on plain tensors: what its graph computes, without any of the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.nodes import ancestors, is_under_no_grad, path_of
from shardcomp.ir.program import B, Program, S


def evaluate(program: Program, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a Program that is one unit, by the caller's names.

    inputs: every input of the Program, [b, s] int64 and the like. parameters: by name, in the Program's dtypes.
    """
    [unit] = program.units
    numbers = {**parameters, **inputs}
    numbers |= {name: buffer.value for name, buffer in program.buffers.items()}
    sizes: dict[sympy.Symbol, int] = {}
    for name, known in program.inputs.items():
        sizes |= {symbol: inputs[name].shape[dim] for dim, symbol in enumerate(known.shape) if symbol in (B, S)}
    env = compute(unit.body.results, numbers, sizes)
    return {key: env[node] for key, node in zip(program.outputs, unit.body.results, strict=True)}


def compute(nodes: Sequence[fx.Node], numbers: Mapping[str, Tensor], sizes: Mapping[sympy.Symbol, int]) -> dict[fx.Node, Any]:
    """The values of some nodes of a graph, and of all that they are computed from. numbers: the values of placeholders, by
    path."""
    env: dict[fx.Node, Any] = {}
    needed = ancestors(nodes)
    for node in nodes[0].graph.nodes if nodes else ():
        if node in needed:
            env[node] = numbers[path_of(node)] if node.op == "placeholder" else call(node, env, sizes)
    return env


def call(node: fx.Node, env: Mapping[fx.Node, Any], sizes: Mapping[sympy.Symbol, int], dtype: torch.dtype | None = None) -> Any:
    """The result of one call, from the results of the nodes that it reads. dtype: what to take for every floating dtype."""

    def concrete(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if dtype is not None and isinstance(argument, torch.dtype) and argument.is_floating_point:
            return dtype
        if isinstance(argument, sympy.Basic):
            number = argument.subs(sizes)
            # Sizes may be compared or divided: s > 1 is a bool, and s / 3 may be no whole number.
            return bool(number) if number.is_Boolean else int(number) if number.is_integer else float(number)
        if isinstance(argument, (list, tuple)):
            return type(argument)(concrete(entry) for entry in argument)
        return argument

    args, kwargs = concrete(tuple(node.args)), {key: concrete(argument) for key, argument in node.kwargs.items()}
    # Before `canonicalize`, a region under no_grad is marked on its calls and has no `detach` around it.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_under_no_grad(node)):
        return node.target(*args, **kwargs)
