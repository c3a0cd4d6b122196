"""How operators may be split: each operator's rule, applied to one call of it.

A rule is a line of the notation (see `sharding.notation`) or, where it depends on the call's arguments, a function. The table
`ir.operators` says which rule an operator of torch has; the fused kernels register theirs. An operator without a rule runs on
replicated operands.

A factor may have a *split form*, an operator that computes with the local shard and an axis; kernels register theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.layout import Size, same
from shardcomp.ir.nodes import has_one_result, tensor_arguments, values
from shardcomp.ir.operators import OPERATORS, facts_of, is_pointwise, operator_of
from shardcomp.sharding.notation import Dims, Entry, Notation, factors_of, parse

aten = torch.ops.aten
HEADS = "n"
"""The factor of the heads, of which keys and values may have fewer than queries."""


@dataclass(frozen=True)
class Form:
    """An operator's split form: `function(*arguments(call), axis)`. Its result is replicated or partial; `exchanges` lists
    the messages it sends itself, as (operation, phase, shape of what this rank passes in, dtype)."""

    function: Callable[..., Any]
    arguments: Callable[[fx.Node], tuple[Any, ...]]
    partial: bool = False
    exchanges: Callable[[fx.Node], list[tuple[str, str, tuple[Size, ...], torch.dtype]]] = field(default=lambda node: [])


@dataclass(frozen=True)
class Factoring:
    """A rule applied to one call: the factors of its tensor operands, in order, and of its results.

    coarse: operands whose factor may have fewer shards than elsewhere, such as the heads of keys and values. alike: result ->
    the one operand that it comes from; it has that operand's placement where that has fewer shards.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    linear: frozenset[int] = frozenset()
    jointly_linear: bool = False
    additive: frozenset[int] = frozenset()
    forms: Mapping[str, Form] = field(default_factory=dict)
    coarse: frozenset[int] = frozenset()
    alike: Mapping[int, int] = field(default_factory=dict)

    def factors(self) -> list[str]:
        """Every factor that may be split, in order of appearance."""
        return list(dict.fromkeys(f for dims in (*self.operands, *self.results) for f in dims if f is not None))


def apply(notation: Notation, node: fx.Node, forms: Mapping[str, Form]) -> Factoring | None:
    """Match a notation to a call by the ranks of its operands; None where they do not fit."""
    named = {entry.keyword: entry for entry in notation.operands if entry.keyword}
    positional = [entry for entry in notation.operands if not entry.keyword]
    entries: list[tuple[Entry, fx.Node]] = []
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if len(tensors) > len(positional):
        return None
    # An optional operand, such as a bias, may be left out at the end.
    entries += zip(positional, tensors, strict=False)
    for key, argument in node.kwargs.items():
        if isinstance(argument, fx.Node):
            if key not in named:
                return None
            entries.append((named[key], argument))
    # `...` has as many dimensions as in the operand that has the most of them.
    leading = max((_value(n).rank - len(e.dims) + 1 for e, n in entries if "..." in e.dims), default=0)
    operands = tuple(factors_of(entry.dims, _value(argument).rank, leading) for entry, argument in entries)
    results = tuple(factors_of(e.dims, v.rank, leading) for e, v in zip(notation.results, _results(node), strict=False))
    if any(dims is None for dims in (*operands, *results)):
        return None
    additive = frozenset(i for i, (entry, _) in enumerate(entries) if entry.additive)
    return Factoring(operands, results, notation.linear, notation.jointly_linear, additive, forms)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Shape:
    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


def _value(node: fx.Node) -> _Shape:
    return _Shape(node.meta["value"].shape)


def _results(node: fx.Node) -> list[_Shape]:
    return [_Shape(result.shape) for result in values(node)]


# Rules that depend on an operator's arguments.


def pointwise(node: fx.Node) -> Factoring:
    """Dimensions are aligned from the right; a dimension of one that is broadcast has no factor."""
    out = _results(node)[0].shape
    names: Dims = tuple(f"d{i}" for i in range(len(out)))
    operands = []
    for argument in tensor_arguments(node):
        shape = _value(argument).shape
        offset = len(out) - len(shape)
        operands.append(tuple(names[offset + i] if same(size, out[offset + i]) else None for i, size in enumerate(shape)))
    linear, joint = _pointwise_linearity(node)
    return Factoring(tuple(operands), (names,), linear, joint)


def _pointwise_linearity(node: fx.Node) -> tuple[frozenset[int], bool]:
    tensors = len(tensor_arguments(node))
    kind = operator_of(node)
    # x + y is linear in both together. x + 1 is not linear: each rank would add the 1.
    if kind in (aten.add, aten.sub):
        return frozenset(), tensors == 2
    if kind is aten.mul:
        return frozenset(range(tensors)), False
    # x / y is linear in x, and with `rounding_mode`, a keyword argument, in nothing.
    if kind is aten.div:
        return frozenset({0}) if isinstance(node.args[0], fx.Node) and len(node.kwargs) == 0 else frozenset(), False
    return (frozenset({0}), False) if kind is aten.neg else (frozenset(), False)


def reshape(node: fx.Node) -> Factoring:
    """Runs of dimensions with the same product correspond; of a run, the major factor may be split on both sides."""
    source, target = _value(tensor_arguments(node)[0]).shape, _results(node)[0].shape
    before: list[str | None] = [None] * len(source)
    after: list[str | None] = [None] * len(target)
    # [n·d] -> [n, d]: a rank's block of rows is a block of heads. A split of the minor d would not be consecutive rows.
    for index, (i, j) in enumerate(_corresponding(source, target)):
        before[i] = after[j] = f"g{index}"
    return Factoring((tuple(before),), (tuple(after),), frozenset({0}))


def _corresponding(source: tuple[Size, ...], target: tuple[Size, ...]) -> list[tuple[int, int]]:
    """The major dimensions (i, j) of each pair of runs of `source` and `target` whose products are equal."""
    # Dimensions of one change no product, and there is nothing in them to split.
    left = [i for i, size in enumerate(source) if not same(size, 1)]
    right = [j for j, size in enumerate(target) if not same(size, 1)]
    pairs: list[tuple[int, int]] = []
    # Take a dimension of each side, and further ones on the smaller side until the products agree: that is one run.
    while left and right:
        first = (left[0], right[0])
        p, q = sympy.sympify(source[left.pop(0)]), sympy.sympify(target[right.pop(0)])
        while not same(p, q):
            if left and _nominal(p) < _nominal(q):
                p *= source[left.pop(0)]
            elif right and _nominal(q) < _nominal(p):
                q *= target[right.pop(0)]
            else:
                # The products never meet again: what is left has no factor.
                return pairs
        pairs.append(first)
    return pairs


def _nominal(size: Size) -> int:
    """A number for a symbolic size, for comparisons only: large primes, so that no product coincides by accident."""
    primes = (1000003, 1000033, 1000037, 1000039)
    expr = sympy.sympify(size)
    return int(expr.subs(dict(zip(sorted(expr.free_symbols, key=str), primes, strict=False))))


def reorder(node: fx.Node) -> Factoring:
    """transpose, permute, t: the same dimensions in another order."""
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    order = list(range(rank))
    packet = operator_of(node)
    if packet is aten.permute:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    elif rank > 1:
        i, j = (0, 1) if packet is aten.t else (node.args[1] % rank, node.args[2] % rank)  # type: ignore[operator]
        order[i], order[j] = order[j], order[i]
    return Factoring((tuple(f"d{i}" for i in range(rank)),), (tuple(f"d{i}" for i in order),), frozenset({0}))


def expand(node: fx.Node) -> Factoring:
    """A dimension that keeps its size may be split; one that is repeated may not."""
    source, target = _value(node.args[0]).shape, _results(node)[0].shape  # type: ignore[arg-type]
    offset = len(target) - len(source)
    factors = {offset + i: f"d{i}" for i, size in enumerate(source) if same(size, target[offset + i])}
    operand = tuple(factors.get(offset + i) for i in range(len(source)))
    return Factoring((operand,), (tuple(factors.get(j) for j in range(len(target))),), frozenset({0}))


def unsqueeze(node: fx.Node) -> Factoring:
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    names: list[str | None] = [f"d{i}" for i in range(rank)]
    at = node.args[1] % (rank + 1)  # type: ignore[operator]
    return Factoring((tuple(names),), ((*names[:at], None, *names[at:]),), frozenset({0}))


def along(position: int, *, gone: bool = False, linear: bool = False) -> Callable[[fx.Node], Factoring]:
    """An operator that works along one dimension, its argument at `position`: that one is not split, the others may be."""

    def rule(node: fx.Node) -> Factoring:
        tensors = tensor_arguments(node)
        rank = _value(tensors[0]).rank
        dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        at = dim % rank if rank else 0  # type: ignore[operator]
        names = tuple(None if i == at else f"d{i}" for i in range(rank))
        result = tuple(n for i, n in enumerate(names) if i != at) if gone else names
        several = len(tensors) > 1
        results = tuple(result for _ in _results(node))
        # cat takes several operands: its result is partial only if all of them are.
        return Factoring((names,) * len(tensors), results, frozenset({0} if linear and not several else ()), linear and several)

    return rule


def reduction(*, contracts: bool = False, linear: bool = False) -> Callable[[fx.Node], Factoring]:
    """sum, mean and the like. Only a sum may be split along what it sums."""

    def rule(node: fx.Node) -> Factoring:
        rank = _value(node.args[0]).rank  # type: ignore[arg-type]
        dims = node.args[1] if len(node.args) > 1 else None
        gone = set(range(rank)) if dims is None else {d % rank for d in ([dims] if isinstance(dims, int) else dims)}  # type: ignore[union-attr]
        keep = len(_results(node)[0].shape) == rank
        # A sum of the ranks' sums is the sum. A maximum or a variance of shards cannot be added up.
        names = tuple(f"d{i}" if contracts or i not in gone else None for i in range(rank))
        result = tuple(None if i in gone else names[i] for i in range(rank) if keep or i not in gone)
        return Factoring((names,), (result,), frozenset({0} if linear else ()))

    return rule


def normalization(position: int) -> Callable[[fx.Node], Factoring]:
    """layer_norm and the like: the last dimensions, as many as the argument at `position` names, are not split."""

    def rule(node: fx.Node) -> Factoring:
        operands = tensor_arguments(node)
        rank, normal = _value(operands[0]).rank, len(node.args[position])  # type: ignore[arg-type]
        # A norm needs all features of a token on one rank.
        names = tuple(f"d{i}" if i < rank - normal else None for i in range(rank))
        weights = tuple((None,) * _value(operand).rank for operand in operands[1:])
        return Factoring((names, *weights), (names,))

    return rule


def matmul(node: fx.Node) -> Factoring | None:
    """Rows by columns, the dimensions in front aligned from the right; vectors have no rule."""
    out = _results(node)[0].shape
    operands = []
    for argument, own in zip(tensor_arguments(node), (("r", "i"), ("i", "o")), strict=True):
        shape = _value(argument).shape
        if len(shape) < 2:
            return None
        offset = len(out) - len(shape)
        front = [f"d{offset + i}" if same(size, out[offset + i]) else None for i, size in enumerate(shape[:-2])]
        operands.append((*front, *own))
    result = (*(f"d{i}" for i in range(len(out) - 2)), "r", "o")
    return Factoring(tuple(operands), (result,), frozenset({0, 1}))


def scaled_attention(node: fx.Node) -> Factoring | None:
    """scaled_dot_product_attention over [b, n, s, d]: heads are split; keys and values may have fewer."""
    tensors = tensor_arguments(node)
    if any(_value(tensor).rank != 4 for tensor in tensors):
        return None
    batch, heads = _results(node)[0].shape[:2]
    operands = []
    for i, tensor in enumerate(tensors):
        b, n, *_ = _value(tensor).shape
        # Keys and values (1, 2) have the factor even with fewer heads. A mask (3) has it only where it has a row per head.
        front = ("b" if same(b, batch) else None, HEADS if same(n, heads) or i in (1, 2) else None)
        operands.append((*front, None, "e" if i == 2 else None))
    return Factoring(tuple(operands), (("b", HEADS, None, "e"),), coarse=frozenset({1, 2}))


def stack(node: fx.Node) -> Factoring:
    tensors = tensor_arguments(node)
    rank = _value(tensors[0]).rank
    at = (node.args[1] if len(node.args) > 1 else 0) % (rank + 1)  # type: ignore[operator]
    names: Dims = tuple(f"d{i}" for i in range(rank))
    return Factoring((names,) * len(tensors), ((*names[:at], None, *names[at:]),), jointly_linear=True)


def index(node: fx.Node) -> Factoring | None:
    """x[:, :, i]: one index, along one dimension; the others may be split."""
    indices = node.args[1]
    at = [i for i, index in enumerate(indices) if index is not None]  # type: ignore[union-attr,arg-type]
    if len(at) != 1:
        return None
    operands = tensor_arguments(node)
    names = [None if i == at[0] else f"d{i}" for i in range(_value(operands[0]).rank)]
    places = tuple(f"i{i}" for i in range(_value(operands[1]).rank))
    result = (*names[: at[0]], *places, *names[at[0] + 1 :])
    return Factoring((tuple(names), places), (result,), frozenset({0}))


def padding(node: fx.Node) -> Factoring:
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    # torch gives (before, after) for each padded dimension, from the last one backwards.
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    names = tuple(f"d{i}" if i < rank - padded else None for i in range(rank))
    return Factoring((names,), (names,))


def item(node: fx.Node) -> Factoring:
    """One of several results: sharded as the operator left it."""
    names = tuple(f"d{i}" for i in range(len(_results(node)[0].shape)))
    return Factoring((names,), (names,), frozenset({0}))


@dataclass(frozen=True)
class Rule:
    """How one operator may be split: a parsed line or a function of the call, and the split forms of its factors."""

    line: Notation | None = None
    function: Callable[[fx.Node], Factoring | None] | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)


_NAMED: dict[str, Callable[[fx.Node], Factoring | None]] = {
    "pointwise": pointwise,
    "reshape": reshape,
    "reorder": reorder,
    "expand": expand,
    "unsqueeze": unsqueeze,
    "along 1": along(1),
    "along 1 linear": along(1, linear=True),
    "along 1 gone": along(1, gone=True),
    "along 1 gone linear": along(1, gone=True, linear=True),
    "along 2": along(2),
    "along 2 linear": along(2, linear=True),
    "sum": reduction(contracts=True, linear=True),
    "reduce": reduction(),
    "matmul": matmul,
    "attention": scaled_attention,
    "norm": normalization(1),
    "stack": stack,
    "index": index,
    "pad": padding,
    "item": item,
}
"""The rules that depend on a call's arguments, by the names that `ir.operators` gives them."""


def _rule_of(text: str) -> Rule:
    return Rule(line=parse(text)) if "->" in text else Rule(function=_NAMED[text])


RULES: dict[Any, Rule] = {target: _rule_of(row.rule) for target, row in OPERATORS.items() if row.rule}
"""Operator -> rule. Keys are ATen operators without their overload, or Python functions."""


def factoring(node: fx.Node) -> Factoring | None:
    """The rule of a call, applied to it; None where the operator has none, or its operands do not fit."""
    # torch's tag `pointwise` is enough for an operator without a row.
    rule = RULES.get(operator_of(node))
    if rule is None:
        return pointwise(node) if is_pointwise(node) and has_one_result(node) else None
    if rule.function is not None:
        return rule.function(node)
    assert rule.line is not None
    return apply(rule.line, node, rule.forms)


def passes_on(node: fx.Node) -> bool:
    """Whether the backward of a call reads none of its operands: a collective, or a call that is linear in what it reads."""
    if node.target in EXCHANGES or facts_of(node).backward == "nothing":
        return True
    rule = factoring(node)
    # The gradient of a linear call of one operand is the transposed call: it needs no value.
    return rule is not None and (rule.jointly_linear or (len(rule.operands) == 1 and 0 in rule.linear))


def unfuse(node: fx.Node) -> tuple[Any, tuple[Any, ...], fx.Node] | None:
    """A product with an added operand as (operator, arguments, the added operand) of the product alone; None if it has none.

    A product whose result is partial must be reduced before anything is added to it.
    """
    packet = operator_of(node)
    if packet is aten.linear and len(node.args) == 3 and isinstance(node.args[2], fx.Node):
        return aten.linear.default, tuple(node.args[:2]), node.args[2]
    if packet is aten.addmm and not node.kwargs and isinstance(node.args[0], fx.Node):
        return aten.mm.default, tuple(node.args[1:3]), node.args[0]
    return None
