"""Which numbers the inputs of a program may hold: tokens are rows of an embedding, labels columns of the logits.

A lookup with a number from elsewhere raises in the dense model. Where the vocabulary is split, every rank would take it for
another rank's. So the bounds are read from the graph, and every batch is compared with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardcomp.ir import operators
from shardcomp.ir.nodes import path_of, role_of, value
from shardcomp.ir.operators import operator_of
from shardcomp.ir.program import INPUT, Degraded, Program
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.runtime.blueprint import IndexBound

aten = torch.ops.aten

_SAME_NUMBERS = operators.with_fact("same_numbers")


def index_bounds(program: Program) -> dict[str, IndexBound]:
    """The bounds of a canonical program's inputs, by name; the tightest where an input is looked up several times."""
    bounds: dict[str, IndexBound] = {}
    for name, bound in _lookups(program):
        tightest = bounds.get(name)
        # Of equal size, the bound without an ignored label is tighter: it does not let -100 pass.
        if tightest is None or bound.size < tightest.size or bound.size == tightest.size and bound.ignored is None:
            bounds[name] = bound
    return bounds


def label_inputs(program: Program) -> tuple[str, ...]:
    """The inputs that hold labels."""
    return tuple(dict.fromkeys(name for name, bound in _lookups(program) if bound.ignored is not None))


def unchecked_labels(program: Program) -> list[Degraded]:
    """What the bounds do not cover: labels that the model computes from several inputs."""
    [unit] = program.units
    return [
        Degraded("labels", "the model computes them: none that is outside of the vocabulary is noticed")
        for node in unit.body.calls()
        if node.target is cross_entropy and _input_of(node.args[1]) is None
    ]


def _lookups(program: Program) -> list[tuple[str, IndexBound]]:
    [unit] = program.units
    lookups = []
    for node in unit.body.calls():
        if node.target is aten.embedding.default:
            name, bound = _input_of(node.args[1]), IndexBound(int(value(node.args[0]).shape[0]))  # type: ignore[arg-type]
        elif node.target is cross_entropy:
            logits, labels, ignored = node.args
            name, bound = _input_of(labels), IndexBound(int(value(logits).shape[1]), int(ignored))  # type: ignore[arg-type]
        else:
            continue
        if name is not None:
            lookups.append((name, bound))
    return lookups


def _input_of(argument: Any) -> str | None:
    """The input whose numbers a tensor has; None where they are computed."""
    while isinstance(argument, fx.Node):
        if argument.op == "placeholder":
            return path_of(argument) if role_of(argument) == INPUT else None
        # A shift by a slice keeps the labels' numbers, but a sum of two inputs has others.
        if operator_of(argument) not in _SAME_NUMBERS:
            return None
        argument = argument.args[0]
    return None
