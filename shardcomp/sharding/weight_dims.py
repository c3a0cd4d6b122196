"""What a policy's words mean for a weight: the dimension that is split, found from the operator that uses it and its rule.

`colwise` splits the factor that the product makes (its output features), `rowwise` the one that it contracts, `vocab` the one
that an embedding looks up or a head makes. So a weight may be stored in any orientation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from shardcomp.ir.layout import Layout, divides, split
from shardcomp.ir.nodes import is_parameter, path_of, stored, tensor_arguments, value
from shardcomp.ir.operators import is_item
from shardcomp.ir.program import PARAMETER, Body, Program, Unit
from shardcomp.policy import Policy
from shardcomp.sharding.rules import factoring

UNEVEN = ("vocab",)
"""Words whose weights may be split unevenly, as `torch.chunk` does."""


def weight_layouts(program: Program, policy: Policy, axis: str, size: int) -> tuple[dict[str, Layout], dict[str, str]]:
    """The layout on `axis` of every parameter that the policy splits, and a message for each that cannot be split so.

    Returns (parameter name -> layout, parameter name -> violation).
    """
    entries = policy.weight_entries(program.parameters, program.canonical_names())
    layouts: dict[str, Layout] = {}
    violations: dict[str, str] = {}
    if size == 1:
        return layouts, violations
    seen: dict[tuple[int, int], int | None] = {}
    for unit in program.units:
        placeholders = unit.body.placeholders(PARAMETER)
        for index, (node, name) in enumerate(zip(placeholders, unit.parameters, strict=True)):
            word = entries.get(name, "whole")
            if word == "whole" or name in layouts:
                continue
            # Layers share a body, so the answer for the first holds for all, and only the first reports a violation.
            key = (id(unit.body), index)
            known = key in seen
            if not known:
                seen[key] = next(dimensions(node, word, tuple(range(len(value(node).shape)))), None)
            dim = seen[key]
            if dim is None:
                # A pattern for a matrix may also match its bias or norm, which then stays replicated.
                if len(value(node).shape) > 1 and not known:
                    violations[name] = f"{name}: {word} does not fit, because no operator that uses it has such a dimension"
                continue
            rows = int(value(node).shape[dim])
            layouts[name] = Layout().put(axis, split(dim))
            if not known and (problem := _indivisible(rows, size, word)):
                violations[name] = f"{name}: {rows} {problem}"
    return layouts, violations


def _indivisible(rows: int, size: int, word: str) -> str | None:
    if word in UNEVEN:
        # All ranks but the last take ceil(rows / size) rows each.
        if -(-rows // size) * (size - 1) >= rows:
            return f"rows leave a rank of tensor = {size} without any: use a smaller degree"
        return None
    if divides(rows, size):
        return None
    legal = ", ".join(str(n) for n in range(1, min(rows, 1024) + 1) if rows % n == 0)
    return f"cannot be split over tensor = {size}: use {legal}"


def dimensions(node: fx.Node, word: str, dims: tuple[int | None, ...]) -> Iterator[int]:
    """The dimensions of a weight that `word` may mean, followed through operators that only rearrange it.

    dims: for each dimension of `node`, the dimension of the weight that it is.
    """
    for user in node.users:
        if user.op != "call_function" or (rule := factoring(user)) is None:
            continue
        operands = tensor_arguments(user)
        names = rule.operands[operands.index(node)]
        # A transpose or a view: follow its result, if each of its dimensions is still one of the weight's.
        if len(operands) == 1:
            through = tuple(dims[names.index(f)] if f in names else None for f in rule.results[0] if f is not None)
            if len(through) == len(rule.results[0]):
                yield from dimensions(user, word, through)
            continue
        beside = ((o, fs) for o, fs in zip(operands, rule.operands, strict=True) if o is not node and not is_parameter(o))
        # In `... i, o i -> ... o`, o is the weight's alone: an output. The batch is in the other operand, too.
        others = {f for _, fs in beside for f in fs}
        result_factors = {f for fs in rule.results for f in fs}
        for i, factor in enumerate(names):
            if factor is None or dims[i] is None:
                continue
            # A vector has one dimension: in a norm over sharded features, it is sharded as they are.
            output, contracted = (
                factor in result_factors and (factor not in others or len(names) == 1),
                factor not in result_factors,
            )
            headed = output and not rule.forms
            looked_up = contracted and factor in rule.forms
            if {"colwise": output, "rowwise": contracted, "vocab": looked_up or headed}[word]:
                yield dims[i]  # type: ignore[misc]


def module_of(unit: Unit, node: fx.Node) -> str:
    """The path in the model of the module that a node of a unit's body comes from."""
    return ".".join(part for part in (unit.path, path_of(node)) if part)


def key_value_weights(body: Body) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Every weight that makes keys or values, with the biases and norms over all of them: (attention, weight, heads)."""
    for call in body.calls():
        rule = factoring(call)
        operands = tensor_arguments(call)
        for i in rule.coarse if rule else ():
            features = int(value(operands[i]).shape[-1])
            products, others = _made_with(operands[i])
            widths = {int(value(product).shape[-1]) for product in products}
            for product in products:
                # Keys end in the features of one head, so a projection of n · features has n heads.
                heads, rest = divmod(int(value(product).shape[-1]), features)
                for weight in map(stored, product.args[1:]) if not rest else ():
                    if weight is not None:
                        yield call, weight, heads
            for weight in others:
                if value(weight).shape[-1:] and (width := int(value(weight).shape[-1])) in widths and width % features == 0:
                    yield call, weight, width // features


def _made_with(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The products with weights that a value is computed from, and the parameters on the way back to them."""
    seen, pending = {node}, [node]
    products, parameters = [], []
    while pending:
        reached = pending.pop()
        if is_parameter(reached):
            parameters.append(reached)
        elif reached.target is torch.ops.aten.linear.default:
            products.append(reached)
        else:
            new = [operand for operand in _operands(reached) if operand not in seen]
            seen.update(new)
            pending += new
    return products, parameters


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a value is computed from: for one of several results, the operand that it alone comes from."""
    call = node.args[0] if is_item(node) else None
    rule = factoring(call) if isinstance(call, fx.Node) else None
    if rule is None or not isinstance(call, fx.Node) or node.args[1] not in rule.alike:
        return tensor_arguments(node)
    return [tensor_arguments(call)[rule.alike[node.args[1]]]]  # type: ignore[index]
