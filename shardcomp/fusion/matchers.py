"""Where a kernel may apply: subgraphs that might compute what it computes, and the calls that may replace them.

A matcher looks at one call, in the graph as it is then: an earlier replacement may have changed what the call reads. A subgraph
begins and ends where the dataflow narrows to one value. Nothing is decided here: a replacement has to pass the check first.
What is looked for is what cannot be missing: a norm takes a root of a mean over features, a rotation adds products with two
tables, a gated MLP multiplies an activated value with another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from shardcomp.fusion.equivalence import Replacement, Subgraph, subgraph_between
from shardcomp.ir import operators
from shardcomp.ir.layout import same
from shardcomp.ir.nodes import ancestors, has_one_result, tensor_arguments, value
from shardcomp.ir.operators import is_item, is_pointwise, operator_name, operator_of
from shardcomp.kernels.add_rms_norm import add_rms_norm
from shardcomp.kernels.attention import attention
from shardcomp.kernels.rms_norm import rms_norm
from shardcomp.kernels.rotary import rotary

aten = torch.ops.aten
_STEPS = 12
"""How many calls a subgraph may reach up and down from where it was noticed."""
_MOVES = operators.with_fact("moves")
_MOMENTS = operators.with_fact("moment")
_ROOTS = operators.with_fact("root")
_NORMS = operators.of_family("norm", fused=False)
_ACTIVATIONS = operators.with_fact("activation")


@dataclass(frozen=True)
class Match:
    """A subgraph and the kernel calls that may replace it, none where no kernel fits."""

    subgraph: Subgraph
    replacements: tuple[Replacement, ...]


@dataclass(frozen=True)
class MatchSite:
    """Where a kernel was looked for: the call that was noticed, and the matches around it, the largest first."""

    anchor: fx.Node
    matches: tuple[Match, ...]
    hint: str = ""
    """Why there is no match, where there is none."""


Proven = tuple[Subgraph, Replacement]
"""A subgraph and the kernel call that was proved to compute the same."""


def match_norm(anchor: fx.Node) -> MatchSite | None:
    """An RMS norm or a layer norm, around a root of a moment over features, or a norm of torch's own."""
    packet = operator_of(anchor)
    if packet not in _MOMENTS | _NORMS or not anchor.args:
        return None
    below = list(_below(anchor))
    # mean(x²) + eps and then the root: the root is a few calls away. A mean without one is no norm.
    if packet in _MOMENTS and not any(_is_root(node) for node in below[:4]):
        return None
    hint = "" if packet in _NORMS or _over_last(anchor) else "it is not taken over the last dimension alone"
    sources = list(_above([anchor.args[0]], _is_elementwise))  # type: ignore[list-item]
    # The furthest ends first, so that the largest subgraph that passes is replaced.
    matches = [] if hint else [c for out in reversed(below) for x in reversed(sources) for c in _norm_subgraphs(out, x)]
    end = below[-1]
    if not hint and len(end.users) > 1:
        hint = f"{shown(end)}, on the way to what it scales, is used elsewhere"
    return MatchSite(anchor, tuple(matches), hint or "what it scales does not begin and end in one value of one shape")


def _norm_subgraphs(out: fx.Node, x: fx.Node) -> Iterator[Match]:
    """A norm from x to `out`, where what else it reads is vectors of its features: parameters, or what is computed from
    them."""
    shape = value(x).shape
    # The last dimension must be features, not the sequence.
    if x is out or value(out).shape != shape or not isinstance(shape[-1], int):
        return

    def is_vector(node: fx.Node) -> bool:
        return has_one_result(node) and value(node).shape == shape[-1:]

    subgraphs: list[Subgraph] = []
    # Some models scale by 1 + w. That sum is inside and the kernel reads w, or it stays outside and the kernel reads 1 + w.
    for inner in (_is_elementwise, lambda node: _is_elementwise(node) and not is_vector(node)):
        subgraph = subgraph_between([out], [x], inner)
        others = [node for node in subgraph.inputs if node is not x]
        # At most a weight and a bias.
        if x in subgraph.inputs and len(others) <= 2 and all(is_vector(node) for node in others) and subgraph not in subgraphs:
            subgraphs.append(subgraph)
            yield Match(subgraph, tuple(_norm_replacements(subgraph, x, others)))


def _norm_replacements(subgraph: Subgraph, x: fx.Node, vectors: list[fx.Node]) -> Iterator[Replacement]:
    """What each kernel of the family `norm` offers, for every constant of the subgraph that may be its eps."""
    constants = subgraph.constants()
    # eps is one of the numbers written into the calls. The check tells which.
    for eps in [constant for constant in constants if 0 < constant < 0.1] or [0.0]:
        for kernel, variants in operators.variants_of("norm"):
            for order, kwargs in variants(eps, constants, len(vectors)):
                yield Replacement(kernel, (x, *(None if i is None else vectors[i] for i in order)), kwargs)


def with_sum(inner: Subgraph, replacement: Replacement) -> Match | None:
    """The RMS norm of a sum with the addition in it.

    A sum of more than two terms is left alone: where some of them are still to be reduced over ranks, these are added up first.
    """
    total = replacement.args[0]
    assert total is not None
    if replacement.function is not rms_norm:
        return None
    if total.target is not aten.add.Tensor or total.kwargs or not all(isinstance(a, fx.Node) for a in total.args):
        return None
    terms: tuple[fx.Node, ...] = total.args  # type: ignore[assignment]
    for term in terms:
        if value(term).shape != value(total).shape or value(term).dtype != value(total).dtype:
            return None
        # (x + attention) + mlp: `tensor_parallel` may add attention and mlp first.
        if term.target is aten.add.Tensor and len(term.users) == 1 and len(tensor_arguments(term)) == 2:
            return None
    nodes = (total, *inner.nodes)
    read = dict.fromkeys((*terms, *(node for node in inner.inputs if node is not total)))
    # The kernel gives both the norm and the sum, which the residual stream needs.
    subgraph = Subgraph(nodes, tuple(read), (*inner.outputs, total))
    return Match(subgraph, (Replacement(add_rms_norm, (*terms, *replacement.args[1:]), replacement.kwargs, (0, 1)),))


def match_rotary(anchor: fx.Node) -> MatchSite | None:
    """Rotary positions of one value, around a sum of two products with tables, one of them of something turned.

    The kernel takes queries and keys together: the replacements here turn one value twice and use the first result.
    """
    products = [a for a in anchor.args if isinstance(a, fx.Node) and operator_of(a) is aten.mul]
    if operator_of(anchor) is not aten.add or anchor.kwargs or len(products) != 2 or products[0] is products[1]:
        return None
    sides = [_table(product) for product in products]
    # x · cos + turned(x) · sin, where turned(x) joins -x₂ and x₁: exactly one side is joined.
    turned = [side is not None and _is_turned(side[0]) for side in sides]
    if None in sides or turned.count(True) != 1:
        return None
    (straight, cos), (around, sin) = (sides[turned.index(flag)] for flag in (False, True))  # type: ignore[misc]
    sources = [x for x in _above([straight, around], _is_move) if has_one_result(x)]
    outs = [anchor, *_below(anchor)]
    matches = [c for out in reversed(outs) for x in reversed(sources) for c in _rotary_subgraphs(out, x, cos, sin)]
    return MatchSite(anchor, tuple(matches))


def _rotary_subgraphs(out: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> Iterator[Match]:
    if not has_one_result(out) or value(out).shape != value(x).shape:
        return
    subgraph = subgraph_between([out], [x, cos, sin], lambda node: _is_move(node) or _is_elementwise(node))
    if set(subgraph.inputs) != {x, cos, sin}:
        return
    replacements = []
    # Turned pairs are half a head apart, or next to each other (interleaved). Each product may be rounded before the sum.
    for interleaved in (False, True):
        for rounded in (False, True):
            kwargs = {name: True for name, on in (("interleaved", interleaved), ("round_each", rounded)) if on}
            replacements.append(Replacement(rotary, (x, x, cos, sin), kwargs, (0,)))
    yield Match(subgraph, tuple(replacements))


def _table(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors of a product with a table that it repeats: the value, and the table."""
    if product.kwargs or not all(isinstance(a, fx.Node) for a in product.args):
        return None
    left, right = product.args
    # The table is broadcast over heads. If both have the product's shape, the table is the one without a gradient.
    repeated = [value(side).shape != value(product).shape for side in (left, right)]  # type: ignore[arg-type]
    if repeated.count(True) != 1:
        repeated = [not value(side).requires_grad for side in (left, right)]  # type: ignore[arg-type]
    if repeated.count(True) != 1:
        return None
    factors = (right, left) if repeated[0] else (left, right)
    return None if value(factors[1]).requires_grad else factors  # type: ignore[arg-type,return-value]


def _is_turned(node: fx.Node) -> bool:
    """Whether a value is joined from several."""
    while operator_of(node) in (aten.reshape, aten.to):
        node = node.args[0]  # type: ignore[assignment]
    return operator_of(node) in (aten.cat, aten.stack)


def match_gated_mlp(anchor: fx.Node) -> MatchSite | None:
    """A product of an activated value with another one of its shape."""
    if operator_of(anchor) is not aten.mul or anchor.kwargs or not all(isinstance(a, fx.Node) for a in anchor.args):
        return None
    if any(value(a).shape != value(anchor).shape for a in anchor.args):  # type: ignore[arg-type]
        return None
    matches: list[Match] = []
    # Either factor may be the activated one, and casts may stand around both.
    for activated, other in (anchor.args, anchor.args[::-1]):
        for out in reversed([anchor, *_casts_below(anchor)]):
            for up in reversed([other, *_casts_above(other)]):  # type: ignore[arg-type]
                for gate in reversed(list(_above([activated], _is_elementwise))):  # type: ignore[list-item]
                    matches += _gated_subgraphs(out, gate, up, activated)  # type: ignore[arg-type]
    return MatchSite(anchor, tuple(matches)) if matches else None


def _gated_subgraphs(out: fx.Node, gate: fx.Node, up: fx.Node, activated: fx.Node) -> Iterator[Match]:
    if gate in (activated, up) or value(gate).shape != value(out).shape or value(gate).dtype != value(up).dtype:
        return
    subgraph = subgraph_between([out], [gate, up], _is_elementwise)
    inside = subgraph_between([activated], [gate], _is_elementwise)
    if set(subgraph.inputs) != {gate, up} or set(inside.inputs) != {gate}:
        return
    if _elementwise_sources(gate) & _elementwise_sources(up):
        return  # both are computed from one value: an activation, written out
    # Without an activation it is a product like any other: no kernel is tried and no miss reported.
    if not any(operator_of(node) in _ACTIVATIONS for node in inside.nodes):
        return
    replacements = [
        Replacement(kernel, (gate, up), {**kwargs, "round_first": True} if first else kwargs)
        # One rounding at the end is tried before a variant that rounds the activation first.
        for first in (False, True)
        for kernel, variants in operators.variants_of("gated")
        for kwargs in variants()
    ]
    yield Match(subgraph, tuple(replacements))


def _elementwise_sources(node: fx.Node) -> set[fx.Node]:
    """A value, and the values of its shape that it is computed from number by number."""
    reached, pending = {node}, [node]
    while pending:
        at = pending.pop()
        if _is_elementwise(at):
            more = [a for a in tensor_arguments(at) if a not in reached and value(a).shape == value(node).shape]
            reached.update(more)
            pending += more
    return reached


def shown(node: fx.Node) -> str:
    """The operator of a call, for messages."""
    return operator_name(node).removeprefix("aten.")


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a call takes numbers one by one, or as the moments of their row."""
    packet = operator_of(node)
    if node.op != "call_function" or not has_one_result(node):
        return False
    return packet in _MOMENTS | _NORMS | {aten.to} or is_pointwise(node)


def _is_move(node: fx.Node) -> bool:
    """Whether a call puts numbers elsewhere, casts them or turns their sign."""
    if node.op != "call_function":
        return False
    return operator_of(node) in _MOVES | {aten.to, aten.neg} or is_item(node)


def _is_root(node: fx.Node) -> bool:
    return operator_of(node) in _ROOTS or operator_of(node) is aten.pow and node.args[1] in (0.5, -0.5)


def _over_last(node: fx.Node) -> bool:
    """Whether a moment is taken over the last dimension alone."""
    rank = len(value(node.args[0]).shape)  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dims is not None and [d % rank for d in ([dims] if isinstance(dims, int) else dims)] == [rank - 1]  # type: ignore[union-attr,operator]


def _below(node: fx.Node) -> Iterator[fx.Node]:
    """What is computed from a value, as long as one call alone reads it, and takes it number by number or puts it beside
    others; the first is the value itself where it is a norm."""
    if operator_of(node) in _NORMS:
        yield node
    for _ in range(_STEPS):
        users = list(node.users)
        if len(users) != 1 or not (_is_elementwise(users[0]) or operator_of(users[0]) is aten.cat):
            return
        node = users[0]
        yield node


def _casts_below(node: fx.Node) -> list[fx.Node]:
    users = list(node.users)
    return users if len(users) == 1 and operator_of(users[0]) is aten.to else []


def _casts_above(node: fx.Node) -> list[fx.Node]:
    return [node.args[0]] if operator_of(node) is aten.to else []  # type: ignore[list-item]


def _above(start: list[fx.Node], inner: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The values that all of `start` is computed from, the nearest first: wherever the calls above it narrow to one value."""
    place = {node: i for i, node in enumerate(start[0].graph.nodes)}
    front = set(start)
    # Open the latest call of the front again and again: where one value is left, all of `start` comes from it.
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


def together(one: Proven, other: Proven) -> Proven | None:
    """Two rotations as one. None where their tables differ, their shapes do not go together, or one reads the other."""
    if (one[1].args[2:], one[1].kwargs) != (other[1].args[2:], other[1].kwargs):
        return None
    subgraphs = [one[0], other[0]]
    x, y = one[1].args[0], other[1].args[0]
    assert x is not None and y is not None
    # One call cannot make both where one is computed from the other.
    if reaches(subgraphs[0].outputs[0], y) or reaches(subgraphs[1].outputs[0], x):
        return None
    # The kernel takes queries first, and keys may have fewer heads. The attention that reads them tells which is which.
    order = (0, 1)
    if attended(subgraphs[1].outputs[0]) == 0 or not pairs(x, y):
        order = (1, 0)
    q, k = ((x, y)[i] for i in order)
    if not pairs(q, k):
        return None
    nodes = tuple(node for node in x.graph.nodes if node in subgraphs[0].nodes or node in subgraphs[1].nodes)
    cos, sin = one[1].args[2:]
    outputs = tuple(subgraphs[i].outputs[0] for i in order)
    subgraph = Subgraph(nodes, (q, k, cos, sin), outputs)  # type: ignore[arg-type]
    return subgraph, Replacement(rotary, (q, k, cos, sin), one[1].kwargs, (0, 1))


def reaches(start: fx.Node, end: fx.Node) -> bool:
    """Whether `end` is computed from `start`."""
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


@dataclass(frozen=True)
class Matcher:
    """How the kernels of one family are put into a graph.

    family: a key of `operators.FAMILIES`.
    match: the site around a call; None where the call is nothing to these kernels.
    extend: for a norm that was proved, a larger match to prove and take instead; None where there is none.
    join: for a kernel that does the same to two values, both as one call; None where these two cannot be.
    whole_features: whether the kernel needs all features of its first operand on one rank.
    """

    family: str
    match: Callable[[fx.Node], MatchSite | None]
    extend: Callable[[Subgraph, Replacement], Match | None] | None = None
    join: Callable[[Proven, Proven], Proven | None] | None = None
    whole_features: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels that it may place."""
        return operators.kernels_of(self.family)


MATCHERS = (
    Matcher("rotary", match_rotary, join=together),
    Matcher("gated", match_gated_mlp),
    Matcher("norm", match_norm, extend=with_sum, whole_features=True),
)
"""All matchers, in the order in which `fuse_kernels` asks them. The kernels of a loss are found by `loss_head`."""
