"""How operators may be split: one line per operator in einsum-like factors, and the few rules that depend on arguments.

The notation, one entry per tensor operand, then the results:

    ... i, o i, +o -> ... o

A name is a *factor*: wherever it appears, that dimension is cut in the same way. `...` stands for any further dimensions, cut
alike in every operand that has them. A factor that no result has is contracted: cutting it makes the results partial. `!`
after a factor: it must stay whole. `+` before an operand: it is added to the result, so it cannot stand beside a partial one.
Operands given by keyword are written `name: dims`. After `|`: `linear 0` (linear in operand 0 alone) or `linear all` (in all
jointly), through which a partial operand may pass as it is.

A factor may have a *split form*, an operator that computes with the local piece and an axis; kernels register theirs.
An operator without a rule needs its operands whole.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.ir.layout import Size, same
from shardcomp.ir.program import Value, tensor_arguments

aten = torch.ops.aten
Dims = tuple[str | None, ...]
"""The factor of each dimension; None for one that must stay whole or is broadcast."""
HEADS = "n"
"""The factor of the heads, of which keys and values may have fewer than queries."""


@dataclass(frozen=True)
class Form:
    """An operator's split form: `function(*arguments(call), axis)`. Its result is whole or partial; `exchanges` lists the
    messages it sends itself, as (operation, phase, shape of what this rank passes in, dtype)."""

    function: Callable[..., Any]
    arguments: Callable[[fx.Node], tuple[Any, ...]]
    partial: bool = False
    exchanges: Callable[[fx.Node], list[tuple[str, str, tuple[Size, ...], torch.dtype]]] = field(default=lambda node: [])


@dataclass(frozen=True)
class Factoring:
    """A rule applied to one call: the factors of its tensor operands, in order, and of its results.

    coarse: operands of which a factor may have fewer pieces than elsewhere, such as the heads of keys and values.
    alike: result -> the one operand that it is made of; it lies as that where that has fewer pieces.
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
        """Every factor that may be cut, in order of appearance."""
        return list(dict.fromkeys(f for dims in (*self.operands, *self.results) for f in dims if f is not None))


@dataclass(frozen=True)
class Entry:
    """One operand or result of a parsed rule."""

    dims: tuple[str, ...]
    keyword: str | None = None
    additive: bool = False


@dataclass(frozen=True)
class Notation:
    """A parsed line of the notation."""

    operands: tuple[Entry, ...]
    results: tuple[Entry, ...]
    linear: frozenset[int] = frozenset()
    jointly_linear: bool = False


def parse(line: str) -> Notation:
    """Parse one line of the notation. Raises ValueError with the place of the fault."""
    text, _, options = line.partition("|")
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"{line!r}: no '->' between operands and results")
    operands = tuple(_entry(part, line) for part in left.split(","))
    results = tuple(_entry(part, line) for part in right.split(","))
    words = options.split()
    if words and words[0] != "linear":
        raise ValueError(f"{line!r}: {words[0]!r} is not an option; use 'linear all' or 'linear' with operand numbers")
    numbers = [word for word in words[1:] if word != "all"]
    return Notation(operands, results, frozenset(int(n) for n in numbers), "all" in words)


def _entry(text: str, line: str) -> Entry:
    keyword, colon, dims = text.partition(":")
    body = (dims if colon else keyword).strip()
    additive = body.startswith("+")
    names = tuple(body.lstrip("+").split())
    for name in names:
        if name != "..." and not re.fullmatch(r"[a-z]\w*!?", name):
            raise ValueError(f"{line!r}: {name!r} is not a factor")
    return Entry(names, keyword.strip() if colon else None, additive)


def apply(notation: Notation, node: fx.Node, forms: Mapping[str, Form]) -> Factoring | None:
    """Match a notation to a call by the ranks of its operands; None where they do not fit."""
    named = {entry.keyword: entry for entry in notation.operands if entry.keyword}
    positional = [entry for entry in notation.operands if not entry.keyword]
    entries: list[tuple[Entry, fx.Node]] = []
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if len(tensors) > len(positional):
        return None
    entries += zip(positional, tensors, strict=False)
    for key, argument in node.kwargs.items():
        if isinstance(argument, fx.Node):
            if key not in named:
                return None
            entries.append((named[key], argument))
    leading = max((_value(n).rank - len(e.dims) + 1 for e, n in entries if "..." in e.dims), default=0)
    operands = tuple(_expand(entry.dims, _value(argument).rank, leading) for entry, argument in entries)
    results = tuple(_expand(e.dims, v.rank, leading) for e, v in zip(notation.results, _results(node), strict=False))
    if any(dims is None for dims in (*operands, *results)):
        return None
    additive = frozenset(i for i, (entry, _) in enumerate(entries) if entry.additive)
    return Factoring(operands, results, notation.linear, notation.jointly_linear, additive, forms)  # type: ignore[arg-type]


def _expand(dims: tuple[str, ...], rank: int, leading: int) -> Dims | None:
    """Write `...` out as the numbered factors that stand for it, counted from the right."""
    if "..." not in dims:
        return tuple(None if d.endswith("!") else d for d in dims) if len(dims) == rank else None
    at = dims.index("...")
    extra = rank - len(dims) + 1
    if extra < 0:
        return None
    middle = tuple(f"_{leading - extra + i}" for i in range(extra))
    return tuple(None if d.endswith("!") else d for d in (*dims[:at], *middle, *dims[at + 1 :]))


@dataclass(frozen=True)
class _Shape:
    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


def _value(node: fx.Node) -> _Shape:
    return _Shape(node.meta["value"].shape)


def _results(node: fx.Node) -> list[_Shape]:
    found = node.meta["value"]
    return [_Shape(v.shape) for v in ([found] if isinstance(found, Value) else found)]


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
    kind = getattr(node.target, "overloadpacket", None)
    if kind in (aten.add, aten.sub):
        return frozenset(), tensors == 2
    if kind is aten.mul:
        return frozenset(range(tensors)), False
    if kind is aten.div:
        return frozenset({0}) if isinstance(node.args[0], fx.Node) and len(node.kwargs) == 0 else frozenset(), False
    return (frozenset({0}), False) if kind is aten.neg else (frozenset(), False)


def reshape(node: fx.Node) -> Factoring:
    """Runs of dimensions with the same product correspond; of a run, the major factor may be cut on both sides."""
    source, target = _value(tensor_arguments(node)[0]).shape, _results(node)[0].shape
    before: list[str | None] = [None] * len(source)
    after: list[str | None] = [None] * len(target)
    for index, (i, j) in enumerate(_corresponding(source, target)):
        before[i] = after[j] = f"g{index}"
    return Factoring((tuple(before),), (tuple(after),), frozenset({0}))


def _corresponding(source: tuple[Size, ...], target: tuple[Size, ...]) -> list[tuple[int, int]]:
    """The major dimensions (i, j) of each pair of runs of `source` and `target` whose products are equal."""
    left = [i for i, size in enumerate(source) if not same(size, 1)]
    right = [j for j, size in enumerate(target) if not same(size, 1)]
    found: list[tuple[int, int]] = []
    while left and right:
        first = (left[0], right[0])
        p, q = sympy.sympify(source[left.pop(0)]), sympy.sympify(target[right.pop(0)])
        while not same(p, q):
            if left and _nominal(p) < _nominal(q):
                p *= source[left.pop(0)]
            elif right and _nominal(q) < _nominal(p):
                q *= target[right.pop(0)]
            else:
                return found
        found.append(first)
    return found


def _nominal(size: Size) -> int:
    """A number for a symbolic size, for comparisons only: large primes, so that no product coincides by accident."""
    primes = (1000003, 1000033, 1000037, 1000039)
    expr = sympy.sympify(size)
    return int(expr.subs(dict(zip(sorted(expr.free_symbols, key=str), primes, strict=False))))


def reorder(node: fx.Node) -> Factoring:
    """transpose, permute, t: the same dimensions in another order."""
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    order = list(range(rank))
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet is aten.permute:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    elif rank > 1:
        i, j = (0, 1) if packet is aten.t else (node.args[1] % rank, node.args[2] % rank)  # type: ignore[operator]
        order[i], order[j] = order[j], order[i]
    return Factoring((tuple(f"d{i}" for i in range(rank)),), (tuple(f"d{i}" for i in order),), frozenset({0}))


def expand(node: fx.Node) -> Factoring:
    """A dimension that keeps its size may be cut; one that is repeated may not."""
    source, target = _value(node.args[0]).shape, _results(node)[0].shape  # type: ignore[arg-type]
    offset = len(target) - len(source)
    kept = {offset + i: f"d{i}" for i, size in enumerate(source) if same(size, target[offset + i])}
    operand = tuple(kept.get(offset + i) for i in range(len(source)))
    return Factoring((operand,), (tuple(kept.get(j) for j in range(len(target))),), frozenset({0}))


def unsqueeze(node: fx.Node) -> Factoring:
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    names: list[str | None] = [f"d{i}" for i in range(rank)]
    at = node.args[1] % (rank + 1)  # type: ignore[operator]
    return Factoring((tuple(names),), ((*names[:at], None, *names[at:]),), frozenset({0}))


def along(position: int, *, gone: bool = False, linear: bool = False) -> Callable[[fx.Node], Factoring]:
    """An operator that works along one dimension, its argument at `position`: that one stays whole, the others may be cut."""

    def rule(node: fx.Node) -> Factoring:
        tensors = tensor_arguments(node)
        rank = _value(tensors[0]).rank
        given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        at = given % rank if rank else 0  # type: ignore[operator]
        names = tuple(None if i == at else f"d{i}" for i in range(rank))
        result = tuple(n for i, n in enumerate(names) if i != at) if gone else names
        several = len(tensors) > 1
        results = tuple(result for _ in _results(node))
        return Factoring((names,) * len(tensors), results, frozenset({0} if linear and not several else ()), linear and several)

    return rule


def reduction(*, contracts: bool = False, linear: bool = False) -> Callable[[fx.Node], Factoring]:
    """sum, mean and the like. Only a sum may be cut along what it sums."""

    def rule(node: fx.Node) -> Factoring:
        rank = _value(node.args[0]).rank  # type: ignore[arg-type]
        dims = node.args[1] if len(node.args) > 1 else None
        gone = set(range(rank)) if dims is None else {d % rank for d in ([dims] if isinstance(dims, int) else dims)}  # type: ignore[union-attr]
        keep = len(_results(node)[0].shape) == rank
        names = tuple(f"d{i}" if contracts or i not in gone else None for i in range(rank))
        result = tuple(None if i in gone else names[i] for i in range(rank) if keep or i not in gone)
        return Factoring((names,), (result,), frozenset({0} if linear else ()))

    return rule


def normalization(position: int) -> Callable[[fx.Node], Factoring]:
    """layer_norm and the like: the last dimensions, as many as the argument at `position` names, stay whole."""

    def rule(node: fx.Node) -> Factoring:
        operands = tensor_arguments(node)
        rank, normal = _value(operands[0]).rank, len(node.args[position])  # type: ignore[arg-type]
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
    """scaled_dot_product_attention over [b, n, s, d]: heads are cut; keys and values may have fewer."""
    tensors = tensor_arguments(node)
    if any(_value(tensor).rank != 4 for tensor in tensors):
        return None
    batch, heads = _results(node)[0].shape[:2]
    operands = []
    for i, tensor in enumerate(tensors):
        b, n, *_ = _value(tensor).shape
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
    """x[:, :, i]: one index, along one dimension; the others may be cut."""
    given = node.args[1]
    at = [i for i, each in enumerate(given) if each is not None]  # type: ignore[union-attr,arg-type]
    if len(at) != 1:
        return None
    operands = tensor_arguments(node)
    names = [None if i == at[0] else f"d{i}" for i in range(_value(operands[0]).rank)]
    places = tuple(f"i{i}" for i in range(_value(operands[1]).rank))
    result = (*names[: at[0]], *places, *names[at[0] + 1 :])
    return Factoring((tuple(names), places), (result,), frozenset({0}))


def padding(node: fx.Node) -> Factoring:
    rank = _value(node.args[0]).rank  # type: ignore[arg-type]
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    names = tuple(f"d{i}" if i < rank - padded else None for i in range(rank))
    return Factoring((names,), (names,))


def item(node: fx.Node) -> Factoring:
    """One of several results: cut as the operator left it."""
    names = tuple(f"d{i}" for i in range(len(_results(node)[0].shape)))
    return Factoring((names,), (names,), frozenset({0}))


@dataclass(frozen=True)
class Rule:
    """How one operator may be split: a parsed line or a function of the call, and the split forms of its factors."""

    line: Notation | None = None
    function: Callable[[fx.Node], Factoring | None] | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)


_LINES = {
    aten.linear: "... i, o i, +o -> ... o | linear 0",
    aten.mm: "r i, i o -> r o | linear 0 1",
    aten.bmm: "z r i, z i o -> z r o | linear 0 1",
    aten.addmm: "+o, r i, i o -> r o | linear 1",
    aten.detach: "... -> ... | linear 0",
    aten.clone: "... -> ... | linear 0",
}
_FUNCTIONS: dict[Any, Callable[[fx.Node], Factoring | None]] = {
    aten.reshape: reshape,
    aten.expand: expand,
    aten.repeat: expand,
    aten.unsqueeze: unsqueeze,
    aten.transpose: reorder,
    aten.permute: reorder,
    aten.t: reorder,
    aten.matmul: matmul,
    aten.scaled_dot_product_attention: scaled_attention,
    aten.layer_norm: normalization(1),
    aten.rms_norm: normalization(1),
    aten.stack: stack,
    aten.index: index,
    aten.unbind: along(1, gone=True),
    aten.repeat_interleave: along(2, linear=True),
    aten.roll: along(2, linear=True),
    aten.slice: along(1, linear=True),
    aten.select: along(1, gone=True, linear=True),
    aten.cat: along(1, linear=True),
    aten.split: along(2),
    aten.chunk: along(2),
    aten.split_with_sizes: along(2),
    aten.softmax: along(1),
    aten.log_softmax: along(1),
    aten.cumsum: along(1),
    aten.flip: along(1),
    aten.sum: reduction(contracts=True, linear=True),
    aten.amax: reduction(),
    aten.var: reduction(),
    aten.any: reduction(),
    aten.pad: padding,
    aten.constant_pad_nd: padding,
    aten.to: pointwise,
    operator.getitem: item,
}
RULES: dict[Any, Rule] = {
    **{target: Rule(line=parse(line)) for target, line in _LINES.items()},
    **{target: Rule(function=function) for target, function in _FUNCTIONS.items()},
}
"""Operator -> rule. Keys are ATen operators without their overload, or Python functions."""


def register(target: Any, line: str, forms: Mapping[str, Form] | None = None) -> None:
    """Give an operator its line and the split forms of its factors."""
    RULES[target] = Rule(line=parse(line), forms=forms or {})


def factoring(node: fx.Node) -> Factoring | None:
    """The rule of a call, applied to it; None where the operator has none, or its operands do not fit."""
    packet = getattr(node.target, "overloadpacket", node.target)
    rule = RULES.get(packet)
    if rule is None:
        tags = getattr(node.target, "tags", ())
        return pointwise(node) if torch.Tag.pointwise in tags and isinstance(node.meta["value"], Value) else None
    if rule.function is not None:
        return rule.function(node)
    assert rule.line is not None
    return apply(rule.line, node, rule.forms)


def unfuse(node: fx.Node) -> tuple[Any, tuple[Any, ...], fx.Node] | None:
    """A product with an added operand as (operator, arguments, the added operand) of the product alone; None if it has none.

    A product whose result is partial must be reduced before anything is added to it.
    """
    packet: Any = getattr(node.target, "overloadpacket", None)
    if packet is aten.linear and len(node.args) == 3 and isinstance(node.args[2], fx.Node):
        return aten.linear.default, tuple(node.args[:2]), node.args[2]
    if packet is aten.addmm and not node.kwargs and isinstance(node.args[0], fx.Node):
        return aten.mm.default, tuple(node.args[1:3]), node.args[0]
    return None
