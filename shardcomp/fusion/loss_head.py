"""Where a loss and the product that makes its logits may be one kernel: the product, the loss, and the calls between.

Between the two a model moves rows (a reshape, a slice that drops the last token), casts, and scales or caps logits. A product
with a matrix takes each row by itself, so that the moves may as well come first; the rest is done to a chunk of the logits as
it is to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.fusion.equivalence import Replacement, Subgraph, subgraph_between
from shardcomp.ir.nodes import value
from shardcomp.ir.operators import operator_name, operator_of
from shardcomp.ir.program import Body
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.kernels.linear_cross_entropy import Step, linear_cross_entropy

aten = torch.ops.aten
_SCALES = {aten.mul: "mul", aten.div: "div"}
_SIZES = {"t": 5, "h": 3, "v": 7}
"""The tokens, features and vocabulary that the proof runs at: nothing in a head depends on them."""


_LEAST_ROWS = 256
"""The tokens of a chunk of logits. A product of fewer rows waits for memory, on a GPU as on a CPU."""


@dataclass(frozen=True)
class LossHead:
    """A mean loss [], the product that makes its logits, and what lies between, in order; `product` is None where that is
    something else, and `violation` says what."""

    mean: fx.Node
    losses: fx.Node
    product: fx.Node | None = None
    between: tuple[fx.Node, ...] = ()
    violation: str = ""


def find_loss_heads(body: Body) -> Iterator[LossHead]:
    """Every sum of losses that is divided by a count."""
    for losses in body.calls():
        # div(sum(cross_entropy(logits, labels)), count) is the form that `canonicalize` gives every loss.
        if losses.target is not cross_entropy:
            continue
        total = _only(losses)
        mean = None if total is None or total.target is not aten.sum.default else _only(total)
        if mean is not None and mean.target is aten.div.Tensor and mean.args[0] is total and isinstance(mean.args[1], fx.Node):
            yield _loss_head(mean, losses)


def _only(node: fx.Node) -> fx.Node | None:
    """The one call that reads a value; None where there are others."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _loss_head(mean: fx.Node, losses: fx.Node) -> LossHead:
    between: list[fx.Node] = []
    at: Any = losses.args[0]
    while True:
        # The kernel never has all logits at once, so nothing else can read them.
        if _only(at) is None:
            return LossHead(mean, losses, violation="its logits are used elsewhere")
        if at.target is aten.linear.default:
            return LossHead(mean, losses, at, tuple(reversed(between)))
        if not (_is_move(at) or _step(at)):
            what = at.name if at.op == "placeholder" else operator_name(at)
            return LossHead(mean, losses, violation=f"its logits are made by {what.removeprefix('aten.')}, not by a product")
        between.append(at)
        at = at.args[0]


def _is_move(node: fx.Node) -> bool:
    """Whether a call takes rows along the last dimension as they are."""
    if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
        return False
    rank, width = len(value(node.args[0]).shape), value(node.args[0]).shape[-1]
    # [b, s, v] -> [b·s, v] is a move. So is the slice that drops the last token, but a slice of the vocabulary is not.
    if node.target is aten.reshape.default:
        return value(node).shape[-1] == width
    return node.target is aten.slice.Tensor and len(node.args) > 1 and node.args[1] % rank != rank - 1  # type: ignore[operator]


def _step(node: fx.Node) -> Step | None:
    """What a call does to every logit, as `linear_cross_entropy` has it."""
    packet = operator_of(node)
    if node.op != "call_function" or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    if packet in _SCALES and len(node.args) == 2 and type(node.args[1]) in (int, float):
        return _SCALES[packet], float(node.args[1])  # type: ignore[arg-type]
    if packet is aten.tanh:
        return "tanh", None
    if packet is aten.to:
        # A cast to a wider dtype changes no number. A narrower one would round.
        before, after = value(node.args[0]).dtype, value(node).dtype
        return ("to", after) if torch.promote_types(before, after) == after else None
    return None


def move_views_before_projection(body: Body, head: LossHead) -> LossHead:
    """The head with its moves made before the product."""
    assert head.product is not None
    graph = body.graph
    x: Any = head.product.args[0]
    width = value(x).shape[-1]
    # First the moves on x, then the product, then the scalings on its new logits, each in the old order.
    with graph.inserting_before(head.product):
        for node in filter(_is_move, head.between):
            before = value(node)
            args = list(node.args)
            args[0] = x
            if node.target is aten.reshape.default:
                # The same rows, but of features in place of logits.
                args[1] = [*args[1][:-1], width]  # type: ignore[index]
            moved = graph.call_function(node.target, tuple(args))
            moved.meta = {**node.meta, "value": replace(value(x), shape=(*before.shape[:-1], width))}
            x = moved
        product = graph.call_function(aten.linear.default, (x, *head.product.args[1:]))
        rows = value(x).shape[:-1]
        product.meta = {
            **head.product.meta,
            "value": replace(value(head.product), shape=(*rows, value(head.product).shape[-1])),
        }
        at, between = product, []
        for node in head.between:
            if not _is_move(node):
                moved = graph.call_function(node.target, (at, *node.args[1:]))
                moved.meta = {**node.meta, "value": replace(value(node), shape=value(product).shape)}
                at = moved
                between.append(moved)
    head.losses.replace_input_with(head.losses.args[0], at)  # type: ignore[arg-type]
    # Readers first: a node with users cannot be erased.
    for node in (*reversed(head.between), head.product):
        graph.erase_node(node)
    return LossHead(head.mean, head.losses, product, tuple(between))


def propose_kernel(head: LossHead, early: bool, tokens: int) -> tuple[Subgraph, Replacement]:
    """The subgraph of a head without moves, and the kernel for it. tokens: of a micro-batch, as costs are weighed for."""
    assert head.product is not None
    x, weight, *bias = head.product.args
    _, labels, ignored = head.losses.args
    count = head.mean.args[1]
    operands: list[Any] = [x, weight, labels, count, *(term for term in bias if term is not None)]
    steps = [step for node in head.between if (step := _step(node))]
    while steps and steps[-1][0] == "to":
        steps.pop()  # the loss is computed in the wide dtype
    columns, width = (int(size) for size in value(weight).shape)  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {"ignore_index": ignored}
    # A chunk of logits is about as large as two hidden states of all tokens, and has rows enough for fast products.
    chunks = min(math.ceil(columns / (2 * width)), tokens // _LEAST_ROWS)
    if chunks > 1:
        kwargs |= {"chunks": chunks, "least_rows": _LEAST_ROWS}
    if not early:
        kwargs["early"] = False
    if steps:
        kwargs["steps"] = tuple(steps)

    def draw(node: fx.Node, generator: torch.Generator) -> Tensor:
        if node is count:
            return torch.tensor(3)
        if node is labels:
            drawn = torch.randint(0, _SIZES["v"], (_SIZES["t"],), generator=generator)
            # One label that does not count: the kernel must leave it out as the loss does.
            drawn[1] = ignored  # type: ignore[assignment]
            return drawn
        shape = {x: "th", weight: "vh"}.get(node, "v")
        return torch.randn([_SIZES[size] for size in shape], generator=generator, dtype=torch.float64)

    subgraph = subgraph_between([head.mean], operands, lambda node: node not in operands)
    return replace(subgraph, draw=draw), Replacement(linear_cross_entropy, tuple(operands), kwargs)


def rows_apart(replacement: Replacement) -> Replacement:
    """The kernel's call without a reshape that only lays all rows in order: it does that itself."""
    x, *others = replacement.args
    if x is None or x.target is not aten.reshape.default or len(value(x).shape) != 2:
        return replacement
    return replace(replacement, args=(x.args[0], *others))  # type: ignore[arg-type]
