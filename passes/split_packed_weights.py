"""Take packed weights apart: a weight whose product is cut into pieces right away becomes one parameter for each piece.

Needs: a canonical Program of one unit. `[q; k; v]` or `[gate; up]` in one matrix cannot be cut over ranks by its rows: each
rank needs its rows of every piece. Where the pieces are rows one behind the other, or where there are fewer groups of them than
ranks, each becomes a parameter of its own, named for where it goes, and the product is made piece by piece. Weights that the
policy does not cut by their outputs stay as they are.

Legality: rows of a product are products of rows. Each piece reads its own rows, and together they read every row once.

    y = linear(x, W); q = y[.., :n]; k = y[.., n:]        q = linear(x, W.q); k = linear(x, W.k)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.interpreter import call
from shardcomp.ir.packed import PackedSlice
from shardcomp.ir.program import (
    BUFFER,
    PARAMETER,
    B,
    Body,
    Context,
    Contract,
    Parameter,
    Program,
    S,
    Value,
    stored,
    tensor_arguments,
    value,
)
from shardcomp.kernels.attention import attention

CONTRACT = Contract(requires=frozenset({"canonical", "unmerged"}), provides=frozenset({"parts"}))

aten = torch.ops.aten
_MOVES = {aten.reshape, aten.transpose, aten.permute, aten.unsqueeze}
_SELECTS = {aten.slice, aten.select, aten.index, aten.split, aten.chunk, aten.split_with_sizes, aten.unbind}
_SIZES = {B: 2, S: 3}
"""The (b, s) at which rows are followed through the graph, neither of them one."""
_ATTENTION = (attention, aten.scaled_dot_product_attention.default)


def run(program: Program, context: Context) -> Program:
    words = context.policy.weight_entries(program.parameters, program.canonical_names())
    return take_apart(program, lambda name: words.get(name) == "colwise", context.mesh.tp)


def take_apart(program: Program, wanted: Callable[[str], bool], ranks: int) -> Program:
    """The Program with every weight in parts that is `wanted` by its name and holds several."""
    [unit] = program.units
    body = unit.body.copy()
    buffers = {node: program.buffers[node.meta["path"]].value for node in body.placeholders(BUFFER)}
    parameters = dict(program.parameters)
    for node in list(body.calls()):
        if node.target is not aten.linear.default:
            continue
        weights = [_source(a) for a in node.args[1:]]
        if any(w is None or not wanted(w.meta["path"]) or len(w.users) > 1 for w in weights):
            continue
        pieces = _pieces(node, buffers, ranks)
        if pieces:
            _replace(body, node, weights, pieces, parameters)  # type: ignore[arg-type]
    names = tuple(node.meta["path"] for node in body.placeholders(PARAMETER))
    return replace(program, units=[replace(unit, body=body, parameters=names)], parameters=parameters)


def _source(argument: Any) -> fx.Node | None:
    """The parameter that an operand of a product is, where nothing else reads it turned over."""
    only = isinstance(argument, fx.Node) and (argument.target is not aten.t.default or len(argument.users) == 1)
    return stored(argument) if only else None


@dataclass(frozen=True)
class _Piece:
    """A value that is cut out of a product: its name, and the rows of the weight that it is made of, in order."""

    node: fx.Node
    name: str
    rows: list[int]
    samples: list[int]
    """The dimensions of the value that count samples and tokens."""


def _pieces(product: fx.Node, buffers: dict[fx.Node, Tensor], ranks: int) -> list[_Piece]:
    """What a product is cut into; empty where it need not be taken apart."""
    found = list(_cuts(product))
    if len(found) < 2 or any(node is None for node, _ in found):
        return []
    followed = [_followed(node, product, buffers) for node, _ in found if node is not None]
    rows = [features for features, _ in followed]
    width = int(value(product).shape[-1])
    if sorted(row for each in rows for row in each) != list(range(width)):
        return []
    groups = [PackedSlice.of_rows("", (width,), 0, each) for each in rows]
    if any(part is None for part in groups):
        return []
    counts = {part.count for part in groups if part is not None}
    within_a_head = any(innermost for _, innermost in found)
    if counts != {1} and (within_a_head or all(count % ranks == 0 for count in counts)):
        return []  # what is cut over ranks is the groups, of which each holds a bit of every piece
    names = _names([node for node, _ in found if node is not None])
    return [_Piece(node, name, *each) for (node, _), name, each in zip(found, names, followed, strict=True) if node is not None]


def _cuts(node: fx.Node) -> Iterator[tuple[fx.Node | None, bool]]:
    """The values that are cut out of `node`, through calls that only rearrange it, and whether along its last dimension; None
    where it is used uncut."""
    for user in node.users:
        packet = getattr(user.target, "overloadpacket", None)
        if user.args and user.args[0] is node and packet in _MOVES:
            yield from _cuts(user)
        elif user.args and user.args[0] is node and packet in _SELECTS:
            results = [user] if isinstance(user.meta["value"], Value) else list(user.users)
            whole = value(node).shape[-1]
            yield from ((each, value(each).shape[-1] != whole) for each in results)
        else:
            yield None, False


def _followed(node: fx.Node, product: fx.Node, buffers: dict[fx.Node, Tensor]) -> tuple[list[int], list[int]]:
    """The features of `product` that `node` is made of, in its order; and the dimensions of `node` that count samples and
    tokens, in the order that these have in `product`."""
    chain = [node]
    while chain[-1] is not product:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    shape = [int(sympy.sympify(size).subs(_SIZES)) for size in value(product).shape]
    feature = torch.arange(shape[-1]).expand(shape)
    token = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1).expand(shape)
    features, tokens = (_run(chain, {**buffers, product: held}) for held in (feature, token))
    steps = {dim: int((tokens.narrow(dim, 1, 1) - tokens.narrow(dim, 0, 1)).max()) for dim in _longer_than_one(tokens)}
    samples = sorted((dim for dim, step in steps.items() if step), key=lambda dim: -steps[dim])
    for dim in sorted(samples, reverse=True):
        features = features.select(dim, 0)
    return [int(row) for row in features.flatten()], samples


def _longer_than_one(held: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(held.shape) if size > 1]


def _run(chain: list[fx.Node], env: dict[fx.Node, Any]) -> Tensor:
    """The value of the first of some calls, each the operand of the one before it."""
    for each in reversed(chain[:-1]):
        env[each] = call(each, env, _SIZES)
    return env[chain[0]]


def _names(pieces: list[fx.Node]) -> list[str]:
    """q, k, v for pieces that an attention takes as such, gate and up for a factor and its gate, else numbers."""
    taken = [_place(piece) for piece in pieces]
    if set(taken) == {"q", "k", "v"} and len(taken) == 3:
        return [str(name) for name in taken]
    if len(pieces) == 2 and (gate := _gate(pieces)) is not None:
        return ["gate" if i == gate else "up" for i in range(2)]
    return [str(i) for i in range(len(pieces))]


def _place(piece: fx.Node) -> str | None:
    """The place in an attention that a value reaches."""
    seen: set[fx.Node] = set()
    pending = [piece]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target in _ATTENTION:
                return "qkv"[user.args.index(node)] if node in user.args[:3] else None
            if user not in seen and user.op == "call_function":
                seen.add(user)
                pending.append(user)
    return None


def _gate(pieces: list[fx.Node]) -> int | None:
    """Which of two values goes through a function before it is multiplied with the other."""
    direct = [any(user.target is aten.mul.Tensor and len(tensor_arguments(user)) == 2 for user in p.users) for p in pieces]
    alone = [len(piece.users) == 1 for piece in pieces]
    if direct.count(True) == 1 and alone[direct.index(True)]:
        return direct.index(False)
    return None


def _replace(
    body: Body, product: fx.Node, weights: list[fx.Node], pieces: list[_Piece], parameters: dict[str, Parameter]
) -> None:
    """Replace each piece by a product of its own, and the weights by their parts."""
    turned = product.args[1] is not weights[0]
    for piece in pieces:
        operands: list[fx.Node] = []
        for index, weight in enumerate(weights):
            dim = 1 if turned and index == 0 else 0
            part = _part(body, weight, dim, piece, parameters)
            if dim == 1:
                with body.graph.inserting_before(product):
                    over = body.graph.call_function(aten.t.default, (part,))
                held = value(part)
                over.meta = {**product.meta, "value": replace(held, shape=held.shape[::-1])}
                part = over
            operands.append(part)
        with body.graph.inserting_before(product):
            alone = body.graph.call_function(aten.linear.default, (product.args[0], *operands))
            held = value(product)
            alone.meta = {**product.meta, "value": replace(held, shape=(*held.shape[:-1], len(piece.rows)))}
            made = _in_shape(body, alone, piece)
        piece.node.replace_all_uses_with(made)
        _join_reshapes(made)
    for weight in weights:
        del parameters[weight.meta["path"]]
    _erase(body, [piece.node for piece in pieces])
    for weight in weights:
        body.graph.erase_node(weight)


def _part(body: Body, weight: fx.Node, dim: int, piece: _Piece, parameters: dict[str, Parameter]) -> fx.Node:
    """A placeholder for the rows of `weight` that a piece is made of."""
    packed = parameters[weight.meta["path"]]
    part = PackedSlice.of_rows(packed.name, packed.shape, dim, piece.rows)
    assert part is not None
    shape = (*packed.shape[:dim], len(piece.rows), *packed.shape[dim + 1 :])
    name = f"{packed.name}.{piece.name}"
    parameters[name] = replace(packed, name=name, shape=shape, part=part)
    with body.graph.inserting_before(weight):
        made = body.graph.placeholder(name.replace(".", "_"))
    made.meta = {**weight.meta, "path": name, "value": replace(value(weight), shape=shape)}
    return made


def _in_shape(body: Body, alone: fx.Node, piece: _Piece) -> fx.Node:
    """[b, s, features] in the shape that a piece has."""
    like = piece.node
    target = value(like).shape
    order = [*piece.samples, *(i for i in range(len(target)) if i not in piece.samples)]
    made = alone
    shape = tuple(target[i] for i in order)
    if shape != value(alone).shape:
        made = body.graph.call_function(aten.reshape.default, (alone, list(shape)))
        made.meta = {**like.meta, "value": replace(value(like), shape=shape)}
    if order != sorted(order):
        turned = body.graph.call_function(aten.permute.default, (made, [order.index(i) for i in range(len(order))]))
        turned.meta = dict(like.meta)
        made = turned
    return made


def _join_reshapes(node: fx.Node) -> None:
    """Let every reshape of a reshape read what that one reads: the sizes in between would only get in a cut's way."""
    if node.target is aten.reshape.default:
        for user in list(node.users):
            if user.target is aten.reshape.default:
                user.args = (node.args[0], *user.args[1:])
        if not node.users:
            node.graph.erase_node(node)


def _erase(body: Body, nodes: list[fx.Node]) -> None:
    """Remove nodes that nothing reads, and what only they read."""
    for node in nodes:
        if node.op == "call_function" and not node.users and node in node.graph.nodes:
            operands = list(node.all_input_nodes)
            body.graph.erase_node(node)
            _erase(body, operands)
