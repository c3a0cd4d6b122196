"""The split form of a mean over a dimension that is divided over an axis, as a norm over all heads takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.program import value
from shardcomp.sharding.rules import RULES, Factoring, Form, Rule, reduction


def split_mean(x: Tensor, dims: list[int], keepdim: bool, count: Size, axis: Axis) -> Tensor:
    """This rank's summand of the mean over `dims`, of which each rank has a piece; `count` elements are averaged in all."""
    return x.sum(dims, keepdim=keepdim) / count


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    source, dims, *rest = node.args
    shape = value(source).shape  # type: ignore[arg-type]
    return source, dims, bool(rest and rest[0]), sympy.prod(shape[d] for d in dims)  # type: ignore[union-attr]


_FORM = Form(split_mean, _arguments, partial=True)


def _rule(node: fx.Node) -> Factoring:
    if len(node.args) < 2 or node.kwargs or not isinstance(node.args[1], (list, tuple)):
        return reduction(linear=True)(node)
    found = reduction(contracts=True, linear=True)(node)
    contracted = [name for name in found.operands[0] if name is not None and name not in found.results[0]]
    return replace(found, forms=dict.fromkeys(contracted, _FORM))


RULES[torch.ops.aten.mean] = Rule(function=_rule)
