"""Where a kernel may apply: pieces of a body that might compute what it computes, and the calls that are proposed for them.

A piece begins and ends where the dataflow narrows to one value. Nothing is decided here: a proposal counts for nothing until it
is proved. What is looked for is what cannot be missing: a norm takes a root of a mean over features, a rotation adds products
with two tables, a gated MLP multiplies an activated value with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from shardcomp.fusion.equivalence import Replacement, Subgraph, subgraph_between
from shardcomp.ir.interpreter import ancestors
from shardcomp.ir.layout import same
from shardcomp.ir.program import Body, Value, tensor_arguments, value
from shardcomp.kernels.add_rms_norm import add_rms_norm
from shardcomp.kernels.attention import attention
from shardcomp.kernels.gated import geglu, swiglu
from shardcomp.kernels.layer_norm import layer_norm
from shardcomp.kernels.rms_norm import rms_norm
from shardcomp.kernels.rotary import rotary

aten = torch.ops.aten
_STEPS = 12
"""How many calls a piece may reach up and down from where it was noticed."""
_VIEWS = {aten.reshape, aten.transpose, aten.permute, aten.unsqueeze, aten.expand, aten.slice, aten.select, aten.split}
_VIEWS |= {aten.chunk, aten.cat, aten.stack, aten.unbind, aten.split_with_sizes, aten.repeat_interleave}
_MOMENTS = {aten.mean, aten.var, aten.sum}
_ROOTS = {aten.rsqrt, aten.sqrt, aten.reciprocal}
_NORMS = {aten.layer_norm, aten.rms_norm}
_ACTIVATES = {aten.silu, aten.gelu, aten.sigmoid, aten.tanh, aten.relu, aten.erf, aten.exp, aten.elu, aten.mish, aten.softplus}


@dataclass(frozen=True)
class Match:
    """A piece and the kernel calls proposed for it, none of them where nothing fits it at all."""

    piece: Subgraph
    proposals: tuple[Replacement, ...]


@dataclass(frozen=True)
class MatchSite:
    """Where a kernel was looked for: the call that was noticed, and the candidates around it, the largest first."""

    anchor: fx.Node
    candidates: tuple[Match, ...]
    hint: str = ""
    """Why there is no candidate, where there is none."""


def match_norms(body: Body) -> Iterator[MatchSite]:
    """RMS norms and layer norms, around each root of a moment over features, and each norm of torch's own."""
    for anchor in body.calls():
        packet = _packet(anchor)
        if packet not in _MOMENTS | _NORMS or not anchor.args:
            continue
        below = list(_below(anchor))
        if packet in _MOMENTS and not any(_is_root(each) for each in below[:4]):
            continue
        hint = "" if packet in _NORMS or _over_last(anchor) else "it is not taken over the last dimension alone"
        sources = list(_above([anchor.args[0]], _is_elementwise))  # type: ignore[list-item]
        found = [] if hint else [c for out in reversed(below) for x in reversed(sources) for c in _norm_candidates(out, x)]
        end = below[-1]
        if not hint and len(end.users) > 1:
            hint = f"{shown(end)}, on the way to what it scales, is used elsewhere"
        yield MatchSite(anchor, tuple(found), hint or "what it scales does not begin and end in one value of one shape")


def _norm_candidates(out: fx.Node, x: fx.Node) -> Iterator[Match]:
    """A norm from x to `out`, where what else it reads is vectors of its features: parameters, or what is made of them."""
    shape = value(x).shape
    if x is out or value(out).shape != shape or not isinstance(shape[-1], int):
        return

    def is_vector(node: fx.Node) -> bool:
        return _single(node) and value(node).shape == shape[-1:]

    pieces: list[Subgraph] = []
    for inner in (_is_elementwise, lambda node: _is_elementwise(node) and not is_vector(node)):
        piece = subgraph_between([out], [x], inner)
        others = [node for node in piece.inputs if node is not x]
        if x in piece.inputs and len(others) <= 2 and all(is_vector(node) for node in others) and piece not in pieces:
            pieces.append(piece)
            yield Match(piece, tuple(_norm_proposals(piece, x, others)))


def _norm_proposals(piece: Subgraph, x: fx.Node, others: list[fx.Node]) -> Iterator[Replacement]:
    constants = piece.constants()
    small = [c for c in constants if 0 < c < 0.1] or [0.0]
    offsets = (0.0, 1.0) if others and 1.0 in constants else (0.0,)
    for eps in small:
        if len(others) < 2:
            for offset in offsets:
                for first in (False, True) if others else (False,):
                    kwargs = {"eps": eps, "offset": offset, "round_first": first}
                    yield Replacement(rms_norm, (x, *others), {k: v for k, v in kwargs.items() if v or k == "eps"})
        for vectors in _assignments(others):
            yield Replacement(layer_norm, (x, *vectors), {"eps": eps})
            yield Replacement(layer_norm, (x, *vectors), {"eps": eps, "stepwise": True})


def _assignments(others: list[fx.Node]) -> list[tuple[fx.Node | None, ...]]:
    """The ways to take vectors for weight and bias."""
    if not others:
        return [()]
    if len(others) == 1:
        return [(others[0],), (None, others[0])]
    return [(others[0], others[1]), (others[1], others[0])]


def with_sum(proposal: Replacement, inner: Subgraph) -> Match | None:
    """The norm of a sum with the addition in it. A sum of more than two terms is left alone: where some of them are still to be
    reduced over ranks, these are added up first."""
    total = proposal.args[0]
    assert total is not None
    if total.target is not aten.add.Tensor or total.kwargs or not all(isinstance(a, fx.Node) for a in total.args):
        return None
    terms: tuple[fx.Node, ...] = total.args  # type: ignore[assignment]
    for term in terms:
        if value(term).shape != value(total).shape or value(term).dtype != value(total).dtype:
            return None
        if term.target is aten.add.Tensor and len(term.users) == 1 and len(tensor_arguments(term)) == 2:
            return None
    nodes = (total, *inner.nodes)
    read = dict.fromkeys((*terms, *(node for node in inner.inputs if node is not total)))
    piece = Subgraph(nodes, tuple(read), (*inner.outputs, total))
    return Match(piece, (Replacement(add_rms_norm, (*terms, *proposal.args[1:]), proposal.kwargs, (0, 1)),))


def match_rotary(body: Body) -> Iterator[MatchSite]:
    """Rotary positions of one value, around each sum of two products with tables, one of them of something turned.

    The kernel takes queries and keys together: the proposals here turn one value twice and use the first result.
    """
    for anchor in body.calls():
        products = [a for a in anchor.args if isinstance(a, fx.Node) and _packet(a) is aten.mul]
        if _packet(anchor) is not aten.add or anchor.kwargs or len(products) != 2 or products[0] is products[1]:
            continue
        sides = [_table(product) for product in products]
        turned = [side is not None and _is_turned(side[0]) for side in sides]
        if None in sides or turned.count(True) != 1:
            continue
        (straight, cos), (around, sin) = (sides[turned.index(flag)] for flag in (False, True))  # type: ignore[misc]
        sources = [x for x in _above([straight, around], _is_move) if _single(x)]
        outs = [anchor, *_below(anchor)]
        found = [c for out in reversed(outs) for x in reversed(sources) for c in _rotary_candidates(out, x, cos, sin)]
        yield MatchSite(anchor, tuple(found))


def _rotary_candidates(out: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> Iterator[Match]:
    if not _single(out) or value(out).shape != value(x).shape:
        return
    piece = subgraph_between([out], [x, cos, sin], lambda node: _is_move(node) or _is_elementwise(node))
    if set(piece.inputs) != {x, cos, sin}:
        return
    proposals = []
    for interleaved in (False, True):
        for each in (False, True):
            kwargs = {name: True for name, on in (("interleaved", interleaved), ("round_each", each)) if on}
            proposals.append(Replacement(rotary, (x, x, cos, sin), kwargs, (0,)))
    yield Match(piece, tuple(proposals))


def _table(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors of a product with a table that it repeats: the value, and the table."""
    if product.kwargs or not all(isinstance(a, fx.Node) for a in product.args):
        return None
    left, right = product.args
    repeated = [value(side).shape != value(product).shape for side in (left, right)]  # type: ignore[arg-type]
    if repeated.count(True) != 1:
        repeated = [not value(side).requires_grad for side in (left, right)]  # type: ignore[arg-type]
    if repeated.count(True) != 1:
        return None
    found = (right, left) if repeated[0] else (left, right)
    return None if value(found[1]).requires_grad else found  # type: ignore[arg-type,return-value]


def _is_turned(node: fx.Node) -> bool:
    """Whether a value is put together of pieces."""
    while _packet(node) in (aten.reshape, aten.to):
        node = node.args[0]  # type: ignore[assignment]
    return _packet(node) in (aten.cat, aten.stack)


def match_gated_mlp(body: Body) -> Iterator[MatchSite]:
    """Products of an activated value with another one of its shape."""
    for anchor in body.calls():
        if _packet(anchor) is not aten.mul or anchor.kwargs or not all(isinstance(a, fx.Node) for a in anchor.args):
            continue
        if any(value(a).shape != value(anchor).shape for a in anchor.args):  # type: ignore[arg-type]
            continue
        found: list[Match] = []
        for activated, other in (anchor.args, anchor.args[::-1]):
            for out in reversed([anchor, *_casts_below(anchor)]):
                for up in reversed([other, *_casts_above(other)]):  # type: ignore[arg-type]
                    for gate in reversed(list(_above([activated], _is_elementwise))):  # type: ignore[list-item]
                        found += _gated_candidates(out, gate, up, activated)  # type: ignore[arg-type]
        if found:
            yield MatchSite(anchor, tuple(found))


def _gated_candidates(out: fx.Node, gate: fx.Node, up: fx.Node, activated: fx.Node) -> Iterator[Match]:
    if gate in (activated, up) or value(gate).shape != value(out).shape or value(gate).dtype != value(up).dtype:
        return
    piece = subgraph_between([out], [gate, up], _is_elementwise)
    inside = subgraph_between([activated], [gate], _is_elementwise)
    if set(piece.inputs) != {gate, up} or set(inside.inputs) != {gate}:
        return
    if _made_of(gate) & _made_of(up):
        return  # both are made of one value: an activation, written out
    if not any(_packet(node) in _ACTIVATES for node in inside.nodes):
        return
    proposals = []
    for first in (False, True):
        kwargs = {"round_first": True} if first else {}
        proposals.append(Replacement(swiglu, (gate, up), kwargs))
        proposals.append(Replacement(geglu, (gate, up), kwargs))
        proposals.append(Replacement(geglu, (gate, up), {"tanh": True, **kwargs}))
    yield Match(piece, tuple(proposals))


def _made_of(node: fx.Node) -> set[fx.Node]:
    """A value, and those of its shape that it is made of number by number."""
    found, pending = {node}, [node]
    while pending:
        at = pending.pop()
        if _is_elementwise(at):
            more = [a for a in tensor_arguments(at) if a not in found and value(a).shape == value(node).shape]
            found.update(more)
            pending += more
    return found


def shown(node: fx.Node) -> str:
    """The operator of a call, for messages."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _single(node: fx.Node) -> bool:
    return isinstance(node.meta.get("value"), Value)


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a call takes numbers one by one, or as the moments of their row."""
    packet = _packet(node)
    if node.op != "call_function" or not _single(node):
        return False
    return packet in _MOMENTS | _NORMS | {aten.to} or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_move(node: fx.Node) -> bool:
    """Whether a call puts numbers elsewhere, casts them or turns their sign."""
    if node.op != "call_function":
        return False
    return _packet(node) in _VIEWS | {aten.to, aten.neg} or getattr(node.target, "__name__", "") == "getitem"


def _is_root(node: fx.Node) -> bool:
    return _packet(node) in _ROOTS or _packet(node) is aten.pow and node.args[1] in (0.5, -0.5)


def _over_last(node: fx.Node) -> bool:
    """Whether a moment is taken over the last dimension alone."""
    rank = len(value(node.args[0]).shape)  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dims is not None and [d % rank for d in ([dims] if isinstance(dims, int) else dims)] == [rank - 1]  # type: ignore[union-attr,operator]


def _below(node: fx.Node) -> Iterator[fx.Node]:
    """What is made of a value, as long as one call alone reads it, and takes it number by number or puts it beside others; the
    first is the value itself where it is a norm."""
    if _packet(node) in _NORMS:
        yield node
    for _ in range(_STEPS):
        users = list(node.users)
        if len(users) != 1 or not (_is_elementwise(users[0]) or _packet(users[0]) is aten.cat):
            return
        node = users[0]
        yield node


def _casts_below(node: fx.Node) -> list[fx.Node]:
    users = list(node.users)
    return users if len(users) == 1 and _packet(users[0]) is aten.to else []


def _casts_above(node: fx.Node) -> list[fx.Node]:
    return [node.args[0]] if _packet(node) is aten.to else []  # type: ignore[list-item]


def _above(start: list[fx.Node], inner: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The values that all of `start` is made of, the nearest first: wherever the calls above it narrow to one value."""
    place = {node: i for i, node in enumerate(start[0].graph.nodes)}
    front = set(start)
    for _ in range(_STEPS):
        if len(front) == 1:
            yield next(iter(front))
        latest = max(front, key=lambda node: place[node])
        if not inner(latest):
            return
        front.remove(latest)
        front |= set(tensor_arguments(latest))
        if not front:
            return


def reaches(start: fx.Node, end: fx.Node) -> bool:
    """Whether `end` is made of `start`."""
    return start in ancestors([end])


def attended(node: fx.Node) -> int | None:
    """Whether a value becomes the queries (0) or the keys (1) of an attention, whatever is done to it; None if neither."""
    seen, pending = set[fx.Node](), [node]
    while pending:
        at = pending.pop(0)
        for user in at.users:
            if user.target is attention:
                return user.args.index(at) if at in user.args[:2] else None
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def pairs(a: fx.Node, b: fx.Node) -> bool:
    """Whether one may be the queries and the other the keys of a rotation: of one shape, but for one dimension that divides."""
    left, right = value(a), value(b)
    if len(left.shape) != len(right.shape) or left.dtype != right.dtype:
        return False
    other = [(m, n) for m, n in zip(left.shape, right.shape, strict=True) if not same(m, n)]
    return not other or len(other) == 1 and all(isinstance(n, int) for n in other[0]) and other[0][0] % other[0][1] == 0
