"""The split form of a mean over a sharded dimension, such as a norm over all heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.nodes import value
from shardcomp.kernels.register import register
from shardcomp.sharding.rules import Factoring, Form, reduction


def split_mean(x: Tensor, dims: list[int], keepdim: bool, count: Size, axis: Axis) -> Tensor:
    """This rank's summand of a mean over sharded dimensions: the sum over ranks is the mean.

    Args:
        x: this rank's shard.
        dims: the dimensions of the mean.
        keepdim: keep them with size one.
        count: the number of averaged elements over all ranks.
        axis: the axis of the mesh over which `dims` are sharded.

    Returns:
        A partial tensor.

    Example:
        Two ranks with the shards [1, 2] and [3, 6] of one dimension; their summands 0.75 and 2.25 add up to the mean 3:

        >>> import torch
        >>> split_mean(torch.tensor([1.0, 2.0]), [0], False, 4, axis=None)
        tensor(0.7500)
    """
    return x.sum(dims, keepdim=keepdim) / count


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    source, dims, *rest = node.args
    shape = value(source).shape  # type: ignore[arg-type]
    return source, dims, bool(rest and rest[0]), sympy.prod(shape[d] for d in dims)  # type: ignore[union-attr]


_FORM = Form(split_mean, _arguments, partial=True)


def _rule(node: fx.Node) -> Factoring:
    if len(node.args) < 2 or node.kwargs or not isinstance(node.args[1], (list, tuple)):
        return reduction(linear=True)(node)
    factoring = reduction(contracts=True, linear=True)(node)
    contracted = [name for name in factoring.operands[0] if name is not None and name not in factoring.results[0]]
    return replace(factoring, forms=dict.fromkeys(contracted, _FORM))


register(split_mean, splits=torch.ops.aten.mean, rule=_rule)
