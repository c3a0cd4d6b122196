"""How a call is made on operands whose dimension 0 is taken apart into several: which operands, and what moves.

A rule says this of one operator, or that a call of it does more than treat the rows of dimension 0 alike and apart.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardcomp.ir.layout import Size, same
from shardcomp.ir.program import Value, tensor_arguments, value
from shardcomp.kernels.dropout import dropout

aten = torch.ops.aten
LeadingSizes = tuple[Size, ...]
"""The sizes that dimension 0 of a value is the product of."""


@dataclass(frozen=True)
class UnmergedCall:
    """The call on twins: what is called with what, and which operands' dimension 0 is the result's. Those give way to their
    twins."""

    rows: tuple[fx.Node, ...]
    target: Any
    args: tuple[Any, ...]


def packet_of(node: fx.Node) -> Any:
    """The operator of a call without its overload, or the Python function."""
    return getattr(node.target, "overloadpacket", node.target)


def unmerge(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """The call with dimension 0 in as many as `lead`; None where the call does more than keep its rows apart."""
    rule = _RULES.get(packet_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()) and isinstance(node.meta["value"], Value):
        rule = _pointwise
    found = rule(node, lead) if rule else None
    if found is None:
        return None
    times = Counter(tensor_arguments(node))
    # Where a value is both rows and something else, putting its twin in its place would change both.
    return found if all(times[row] == count for row, count in Counter(found.rows).items()) else None


def row_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of a call whose dimension 0 is its result's, one by one."""
    found = unmerge(node, ())
    return found.rows if found else ()


def _pointwise(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """Other operands are broadcast from the right, and so they are onto the twins."""
    out = value(node).shape
    operands = [(argument, value(argument).shape) for argument in tensor_arguments(node)]
    rows = tuple(argument for argument, shape in operands if out and len(shape) == len(out) and same(shape[0], out[0]))
    return UnmergedCall(rows, node.target, node.args)


def _by_row(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """The first operand's last dimensions are worked on, and nothing is said by number."""
    source: Any = node.args[0]
    return UnmergedCall((source,), node.target, node.args)


def _linear(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    return _by_row(node, lead) if len(value(node).shape) > 1 else None


def _normalization(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    return _by_row(node, lead) if len(node.args[1]) < len(value(node).shape) else None  # type: ignore[arg-type]


def _padding(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    return _by_row(node, lead) if len(node.args[1]) // 2 < len(value(node).shape) else None  # type: ignore[arg-type]


def _product(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """Matrices by matrices, one for each row, or rows by one matrix."""
    out = value(node).shape
    shapes = [value(argument).shape for argument in tensor_arguments(node)]
    if min(len(shape) for shape in shapes) < 2:
        return None
    pairs = zip(tensor_arguments(node), shapes, strict=True)
    batched = tuple(n for n, shape in pairs if len(shape) == len(out) and same(shape[0], out[0]))
    rows = batched if len(out) > 2 else tuple(tensor_arguments(node)[:1])
    return UnmergedCall(rows, aten.matmul.default, node.args)


def _along(position: int, *, new: bool = False) -> Callable[[fx.Node, LeadingSizes], UnmergedCall | None]:
    """An operator that works along the dimensions, or the one, that its argument at `position` says. new: it makes it."""

    def rule(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
        rows = tuple(tensor_arguments(node))
        given = node.args[position] if len(node.args) > position else None
        several = isinstance(given, (list, tuple))
        dims = _moved(given if several else [given], len(value(rows[0]).shape) + new, lead)  # type: ignore[list-item,arg-type]
        if not dims or 0 in dims:
            return None
        moved = dims if several else dims[0]
        return UnmergedCall(rows, node.target, (*node.args[:position], moved, *node.args[position + 1 :]))

    return rule


def _moved(dims: Iterable[Any], rank: int, lead: LeadingSizes) -> list[int]:
    """Where dimensions are among those of the twin, counted from the left; empty where one is not given."""
    dims = list(dims)
    if any(d is None for d in dims):
        return []
    return [d % rank + (max(len(lead) - 1, 0) if d % rank else 0) for d in dims]


def _transpose(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    dims = _moved(node.args[1:3], len(value(source).shape), lead)
    return None if 0 in dims else UnmergedCall((source,), node.target, (source, *dims))


def _permute(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    first, *others = _moved(node.args[1], len(value(source).shape), lead)  # type: ignore[arg-type]
    return None if first else UnmergedCall((source,), node.target, (source, [*range(len(lead)), *others]))


def _expand(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    before, after = value(source).shape, value(node).shape
    if len(before) != len(after) or not same(before[0], after[0]):
        return None
    return UnmergedCall((source,), node.target, (source, [*lead, *after[1:]]))


_RULES: dict[Any, Callable[[fx.Node, LeadingSizes], UnmergedCall | None]] = {
    **dict.fromkeys((dropout, aten.to, aten.detach, aten.where, aten.masked_fill), _pointwise),
    **dict.fromkeys((aten.layer_norm, aten.rms_norm), _normalization),
    **dict.fromkeys((aten.pad, aten.constant_pad_nd), _padding),
    **dict.fromkeys((aten.mm, aten.bmm, aten.matmul), _product),
    **dict.fromkeys((aten.softmax, aten.log_softmax, aten.cumsum, aten.flip, aten.slice, aten.select, aten.cat), _along(1)),
    **dict.fromkeys((aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.any, aten.unbind), _along(1)),
    **dict.fromkeys((aten.split, aten.chunk, aten.split_with_sizes, aten.repeat_interleave, aten.roll), _along(2)),
    **dict.fromkeys((aten.unsqueeze, aten.stack), _along(1, new=True)),
    aten.linear: _linear,
    aten.transpose: _transpose,
    aten.permute: _permute,
    aten.expand: _expand,
    operator.getitem: _by_row,
}
