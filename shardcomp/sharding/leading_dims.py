"""A call on operands whose dimension 0 is split into several: which operands change, and which arguments move.

Each rule says this of one operator, or that a call of it does more than treat the rows of dimension 0 alike and independently.
The table `ir.operators` says which rule an operator has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardcomp.ir.layout import Size, same
from shardcomp.ir.nodes import has_one_result, tensor_arguments, value
from shardcomp.ir.operators import facts_of, is_pointwise

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


def unmerge(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """The call with dimension 0 in as many as `lead`; None where the call does more than keep its rows apart."""
    rule = _NAMED.get(facts_of(node).rows)
    if rule is None and is_pointwise(node) and has_one_result(node):
        rule = _pointwise
    unmerged = rule(node, lead) if rule else None
    if unmerged is None:
        return None
    times = Counter(tensor_arguments(node))
    # Where a value is both rows and something else, putting its twin in its place would change both.
    return unmerged if all(times[row] == count for row, count in Counter(unmerged.rows).items()) else None


def row_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of a call whose dimension 0 is its result's, one by one."""
    # Which operands have rows does not depend on the sizes, so any will do.
    unmerged = unmerge(node, ())
    return unmerged.rows if unmerged else ()


def _pointwise(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """Other operands are broadcast from the right, and so they are onto the twins."""
    out = value(node).shape
    operands = [(argument, value(argument).shape) for argument in tensor_arguments(node)]
    # Only operands with dimension 0 of the result. A bias [o] has none and stays as it is.
    rows = tuple(argument for argument, shape in operands if out and len(shape) == len(out) and same(shape[0], out[0]))
    return UnmergedCall(rows, node.target, node.args)


def _by_row(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    """The first operand's last dimensions are worked on, and nothing is said by number."""
    source: Any = node.args[0]
    return UnmergedCall((source,), node.target, node.args)


def _linear(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    # A vector has features and no rows.
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
    # bmm has a matrix of both operands for each row of dimension 0. In mm only the left operand has rows.
    batched = tuple(n for n, shape in pairs if len(shape) == len(out) and same(shape[0], out[0]))
    rows = batched if len(out) > 2 else tuple(tensor_arguments(node)[:1])
    # mm and bmm take exactly two and three dimensions, and the twins have more.
    return UnmergedCall(rows, aten.matmul.default, node.args)


def _along(position: int, *, new: bool = False) -> Callable[[fx.Node, LeadingSizes], UnmergedCall | None]:
    """An operator that works along the dimensions, or the one, that its argument at `position` says. new: it makes it."""

    def rule(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
        rows = tuple(tensor_arguments(node))
        argument = node.args[position] if len(node.args) > position else None
        several = isinstance(argument, (list, tuple))
        dims = _moved(argument if several else [argument], len(value(rows[0]).shape) + new, lead)  # type: ignore[list-item,arg-type]
        # A sum or softmax along dimension 0 mixes the rows.
        if not dims or 0 in dims:
            return None
        moved = dims if several else dims[0]
        return UnmergedCall(rows, node.target, (*node.args[:position], moved, *node.args[position + 1 :]))

    return rule


def _moved(dims: Iterable[Any], rank: int, lead: LeadingSizes) -> list[int]:
    """The dimensions of the twin that these become, counted from the left; empty where one is None."""
    dims = list(dims)
    if any(d is None for d in dims):
        return []
    # Dimension 0 becomes len(lead) dimensions, so the others move right by len(lead) - 1.
    return [d % rank + (max(len(lead) - 1, 0) if d % rank else 0) for d in dims]


def _transpose(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    dims = _moved(node.args[1:3], len(value(source).shape), lead)
    return None if 0 in dims else UnmergedCall((source,), node.target, (source, *dims))


def _permute(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    first, *others = _moved(node.args[1], len(value(source).shape), lead)  # type: ignore[arg-type]
    # The rows must stay in front.
    return None if first else UnmergedCall((source,), node.target, (source, [*range(len(lead)), *others]))


def _expand(node: fx.Node, lead: LeadingSizes) -> UnmergedCall | None:
    source: Any = node.args[0]
    before, after = value(source).shape, value(node).shape
    if len(before) != len(after) or not same(before[0], after[0]):
        return None
    return UnmergedCall((source,), node.target, (source, [*lead, *after[1:]]))


_NAMED: dict[str, Callable[[fx.Node, LeadingSizes], UnmergedCall | None]] = {
    "pointwise": _pointwise,
    "by row": _by_row,
    "linear": _linear,
    "matmul": _product,
    "norm": _normalization,
    "pad": _padding,
    "along 1": _along(1),
    "along 2": _along(2),
    "along 1 new": _along(1, new=True),
    "transpose": _transpose,
    "permute": _permute,
    "expand": _expand,
}
"""The rules by the names that `ir.operators` gives them."""
