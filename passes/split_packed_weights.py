"""Split packed weights: a weight that packs several, such as `[q; k; v]` or `[gate; up]`, becomes one parameter for each.

A packed matrix cannot be sharded by its rows, because each rank needs its rows of every slice. Each slice becomes a parameter
of its own, named for where it goes, and the product is made once for each slice. This happens where the slices are consecutive
rows, or where there are fewer groups of them than ranks. Weights that the policy does not split by their outputs stay packed.

Legality: rows of a product are products of rows. Each slice reads its own rows, and together they read every row once.

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

from shardcomp.ir import operators
from shardcomp.ir.interpreter import call
from shardcomp.ir.nodes import has_one_result, path_of, stored, tensor_arguments, value
from shardcomp.ir.operators import operator_of
from shardcomp.ir.packed import PackedSlice
from shardcomp.ir.program import BUFFER, PARAMETER, B, Body, Context, Contract, Parameter, Program, S

CONTRACT = Contract(requires=frozenset({"canonical", "unmerged"}), provides=frozenset({"parts"}))

aten = torch.ops.aten
_MOVES = operators.with_fact("bijective")
_SELECTS = operators.with_fact("selects")
_ATTENTION = operators.of_family("attention") & operators.with_fact("mixes_tokens")
_SIZES = {B: 2, S: 3}
"""The (b, s) at which rows are followed through the graph, neither of them one."""


def run(program: Program, context: Context) -> Program:
    words = context.policy.weight_entries(program.parameters, program.canonical_names())
    return split_packed(program, lambda name: words.get(name) == "colwise", context.mesh.tp)


def split_packed(program: Program, should_split: Callable[[str], bool], ranks: int) -> Program:
    """The Program with each packed weight split into its slices where `should_split` says so of its name."""
    [unit] = program.units
    body = unit.body.copy()
    buffers = {node: program.buffers[path_of(node)].value for node in body.placeholders(BUFFER)}
    parameters = dict(program.parameters)
    for node in list(body.calls()):
        if node.target is not aten.linear.default:
            continue
        # The weight and, where there is one, the bias. One that something else reads as well stays packed.
        weights = [_source(a) for a in node.args[1:]]
        if any(w is None or not should_split(path_of(w)) or len(w.users) > 1 for w in weights):
            continue
        slices = _slices(node, buffers, ranks)
        if slices:
            _replace(body, node, weights, slices, parameters)  # type: ignore[arg-type]
    names = tuple(path_of(node) for node in body.placeholders(PARAMETER))
    return replace(program, units=[replace(unit, body=body, parameters=names)], parameters=parameters)


def _source(argument: Any) -> fx.Node | None:
    """The parameter that an operand of a product is, where nothing else reads it transposed."""
    only = isinstance(argument, fx.Node) and (argument.target is not aten.t.default or len(argument.users) == 1)
    return stored(argument) if only else None


@dataclass(frozen=True)
class _Slice:
    """A value that is sliced out of a product: its name, and the rows of the weight that it comes from, in order."""

    node: fx.Node
    name: str
    rows: list[int]
    samples: list[int]
    """The dimensions of the value that count samples and tokens."""


def _slices(product: fx.Node, buffers: dict[fx.Node, Tensor], ranks: int) -> list[_Slice]:
    """The slices that a product is split into; empty where its weight can stay packed."""
    sliced = list(_sliced_values(product))
    # Something reads the product in full: it is needed as it is.
    if len(sliced) < 2 or any(node is None for node, _ in sliced):
        return []
    traced = [_trace_rows(node, product, buffers) for node, _ in sliced if node is not None]
    rows = [features for features, _ in traced]
    width = int(value(product).shape[-1])
    # Slices that overlap or leave rows out are no parameters of their own.
    if sorted(row for rows_of_one in rows for row in rows_of_one) != list(range(width)):
        return []
    # None where the rows are no runs at one stride, such as a permutation.
    groups = [PackedSlice.of_rows("", (width,), 0, rows_of_one) for rows_of_one in rows]
    if any(part is None for part in groups):
        return []
    # count is 1 for [q; k; v]. It is the number of heads for [q0; k0; v0; q1; k1; v1; …], as GPT-NeoX packs them.
    counts = {part.count for part in groups if part is not None}
    within_a_head = any(innermost for _, innermost in sliced)
    if counts != {1} and (within_a_head or all(count % ranks == 0 for count in counts)):
        return []  # the groups are split over ranks, and each of them has some rows of every slice
    names = _names([node for node, _ in sliced if node is not None])
    return [
        _Slice(node, name, *rows_of_one)
        for (node, _), name, rows_of_one in zip(sliced, names, traced, strict=True)
        if node is not None
    ]


def _sliced_values(node: fx.Node) -> Iterator[tuple[fx.Node | None, bool]]:
    """The values that are sliced out of `node`, through calls that only rearrange it, and whether along its last dimension;
    None where it is read whole."""
    for user in node.users:
        packet = operator_of(user)
        if user.args and user.args[0] is node and packet in _MOVES:
            yield from _sliced_values(user)
        elif user.args and user.args[0] is node and packet in _SELECTS:
            # `split` and `chunk` give a tuple, whose items are the slices.
            results = [user] if has_one_result(user) else list(user.users)
            width = value(node).shape[-1]
            yield from ((result, value(result).shape[-1] != width) for result in results)
        else:
            yield None, False


def _trace_rows(node: fx.Node, product: fx.Node, buffers: dict[fx.Node, Tensor]) -> tuple[list[int], list[int]]:
    """The features of `product` that `node` comes from, in its order; and the dimensions of `node` that count samples and
    tokens, in the order that these have in `product`."""
    chain = [node]
    while chain[-1] is not product:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    shape = [int(sympy.sympify(size).subs(_SIZES)) for size in value(product).shape]
    # Run the graph on numbers that say where they come from: in one tensor each element holds its feature's index, in the
    # other its token's. What comes out tells the rows of the slice, and which dimensions count tokens.
    feature = torch.arange(shape[-1]).expand(shape)
    token = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1).expand(shape)
    features, tokens = (_run(chain, {**buffers, product: numbers}) for numbers in (feature, token))
    steps = {dim: int((tokens.narrow(dim, 1, 1) - tokens.narrow(dim, 0, 1)).max()) for dim in _longer_than_one(tokens)}
    # The larger the step from one token to the next, the further left the dimension is in the product.
    samples = sorted((dim for dim, step in steps.items() if step), key=lambda dim: -steps[dim])
    for dim in sorted(samples, reverse=True):
        # All tokens have the same features: look at the first.
        features = features.select(dim, 0)
    return [int(row) for row in features.flatten()], samples


def _longer_than_one(tensor: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(tensor.shape) if size > 1]


def _run(chain: list[fx.Node], env: dict[fx.Node, Any]) -> Tensor:
    """The value of the first of some calls, each the operand of the one before it."""
    for node in reversed(chain[:-1]):
        env[node] = call(node, env, _SIZES)
    return env[chain[0]]


def _names(nodes: list[fx.Node]) -> list[str]:
    """q, k, v for values that an attention takes as such, gate and up for a factor and its gate, else numbers."""
    taken = [_place(node) for node in nodes]
    if set(taken) == {"q", "k", "v"} and len(taken) == 3:
        return [str(name) for name in taken]
    if len(nodes) == 2 and (gate := _gate(nodes)) is not None:
        return ["gate" if i == gate else "up" for i in range(2)]
    return [str(i) for i in range(len(nodes))]


def _place(start: fx.Node) -> str | None:
    """The place in an attention that a value reaches."""
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        for user in node.users:
            if operator_of(user) in _ATTENTION:
                return "qkv"[user.args.index(node)] if node in user.args[:3] else None
            if user not in seen and user.op == "call_function":
                seen.add(user)
                pending.append(user)
    return None


def _gate(nodes: list[fx.Node]) -> int | None:
    """Which of two values goes through a function before it is multiplied with the other."""
    # `up` goes straight into the product. `gate` goes through an activation before it.
    direct = [any(user.target is aten.mul.Tensor and len(tensor_arguments(user)) == 2 for user in p.users) for p in nodes]
    alone = [len(node.users) == 1 for node in nodes]
    if direct.count(True) == 1 and alone[direct.index(True)]:
        return direct.index(False)
    return None


def _replace(
    body: Body, product: fx.Node, weights: list[fx.Node], slices: list[_Slice], parameters: dict[str, Parameter]
) -> None:
    """Replace each slice by a product of its own, and the weights by their slices."""
    # The weight is stored as [in, out] (GPT-2), and the product reads its transpose. Rows of the product are then its columns.
    # A bias has one dimension either way.
    transposed = product.args[1] is not weights[0]
    for sliced in slices:
        operands: list[fx.Node] = []
        for index, weight in enumerate(weights):
            dim = 1 if transposed and index == 0 else 0
            part = _part(body, weight, dim, sliced, parameters)
            if dim == 1:
                with body.graph.inserting_before(product):
                    transpose = body.graph.call_function(aten.t.default, (part,))
                known = value(part)
                transpose.meta = {**product.meta, "value": replace(known, shape=known.shape[::-1])}
                part = transpose
            operands.append(part)
        with body.graph.inserting_before(product):
            slice_product = body.graph.call_function(aten.linear.default, (product.args[0], *operands))
            known = value(product)
            slice_product.meta = {**product.meta, "value": replace(known, shape=(*known.shape[:-1], len(sliced.rows)))}
            result = _in_shape(body, slice_product, sliced)
        sliced.node.replace_all_uses_with(result)
        _join_reshapes(result)
    for weight in weights:
        del parameters[path_of(weight)]
    _erase(body, [sliced.node for sliced in slices])
    for weight in weights:
        body.graph.erase_node(weight)


def _part(body: Body, weight: fx.Node, dim: int, sliced: _Slice, parameters: dict[str, Parameter]) -> fx.Node:
    """A placeholder for the rows of `weight` that a slice comes from."""
    packed = parameters[path_of(weight)]
    part = PackedSlice.of_rows(packed.name, packed.shape, dim, sliced.rows)
    assert part is not None
    shape = (*packed.shape[:dim], len(sliced.rows), *packed.shape[dim + 1 :])
    name = f"{packed.name}.{sliced.name}"
    parameters[name] = replace(packed, name=name, shape=shape, part=part)
    with body.graph.inserting_before(weight):
        placeholder = body.graph.placeholder(name.replace(".", "_"))
    placeholder.meta = {**weight.meta, "path": name, "value": replace(value(weight), shape=shape)}
    return placeholder


def _in_shape(body: Body, slice_product: fx.Node, sliced: _Slice) -> fx.Node:
    """[b, s, features] in the shape that the slice had."""
    like = sliced.node
    target = value(like).shape
    # The product has samples first and features last. So: reshape to that order, then permute to the slice's own.
    order = [*sliced.samples, *(i for i in range(len(target)) if i not in sliced.samples)]
    result = slice_product
    shape = tuple(target[i] for i in order)
    if shape != value(slice_product).shape:
        result = body.graph.call_function(aten.reshape.default, (slice_product, list(shape)))
        result.meta = {**like.meta, "value": replace(value(like), shape=shape)}
    if order != sorted(order):
        permuted = body.graph.call_function(aten.permute.default, (result, [order.index(i) for i in range(len(order))]))
        permuted.meta = dict(like.meta)
        result = permuted
    return result


def _join_reshapes(node: fx.Node) -> None:
    """Let every reshape of a reshape read what that one reads: the sizes in between would only keep layouts from getting
    through."""
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
            # Noted before the node goes: its operands may have lost their last reader.
            operands = list(node.all_input_nodes)
            body.graph.erase_node(node)
            _erase(body, operands)
