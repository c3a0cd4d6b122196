"""Floating-point operations and memory traffic of a Program, by the operators' rules, as expressions in b and s.

A product, an operator whose rule has factors that are contracted between operands, costs 2 × the product of all its factors.
Attention costs 2·b·n·q·k·(d + e), also where it is causal: half of that is a convention of some reports, not counted here. A
reduction costs one operation for each element that it reduces, and everything else one for each element of its results, where
those are floating. Views and collectives cost nothing here.

The backward of a product costs its forward again for each operand that needs a gradient, the backward of attention costs its
forward twice, any other backward its forward once. Traffic is what operands and results occupy, each read or written once.

A global count is of full values; a rank's share counts what layouts leave it of each factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from torch import fx

from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.layout import Size, same
from shardcomp.ir.nodes import form_of, requires_grad, tensor_arguments, values
from shardcomp.ir.operators import facts_of, is_item
from shardcomp.ir.program import Body, Unit, Value
from shardcomp.kernels.linear_cross_entropy import is_early
from shardcomp.sharding.rules import RULES, Factoring, apply, factoring


@dataclass(frozen=True)
class Share:
    """Whose share is counted: the degrees of the mesh, and a rank's coordinates (by default the first rank's)."""

    sizes: dict[str, int]
    rank: dict[str, int] | None = None

    def shape(self, tensor: Value) -> tuple[Size, ...]:
        return tensor.layout.local_shape(tensor.shape, self.sizes, self.rank)


@dataclass(frozen=True)
class Work:
    """What one direction of a call does: operations in products (attention among them), other operations, bytes read and
    written."""

    products: Size = 0
    others: Size = 0
    bytes: Size = 0

    @property
    def flops(self) -> Size:
        return self.products + self.others

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.others + other.others, self.bytes + other.bytes)


@dataclass(frozen=True)
class Compute:
    """What a call or a unit does forward, and backward."""

    forward: Work = Work()
    backward: Work = Work()

    @property
    def total(self) -> Work:
        return self.forward + self.backward

    def __add__(self, other: Compute) -> Compute:
        return Compute(self.forward + other.forward, self.backward + other.backward)


def of_node(node: fx.Node, share: Share | None = None) -> Compute:
    """What one call costs: globally, or a rank's share of it."""
    if node.op != "call_function" or node.target in EXCHANGES or _is_view(node):
        return Compute()
    operands = tensor_arguments(node)
    shapes = [_shape(operand, share) for operand in operands]
    results = [result for result in values(node) if isinstance(result, Value)]
    graded = [requires_grad(operand) for operand in operands]
    floating = any(output.floating for output in results)
    elements: Size = sum(sympy.prod(_local(output, share)) for output in results)
    written: Size = sum(sympy.prod(_local(output, share)) * output.dtype.itemsize for output in results)
    rule, row = _rule(node), facts_of(node)
    products, others, times = 0, 0, 1
    lookups: set[int] = set()
    if row.family == "attention":
        # Scores take 2·b·n·q·k·d, and their product with the values 2·b·n·q·k·e.
        (b, n, q, d), (_, _, k, _), (_, _, _, e) = shapes[:3]
        products, times = 2 * b * n * q * k * (d + e), 2
    elif rule is not None and (contracted := _contracted(rule)):
        # A factor that several operands have is multiplied and summed: a product. One that a single operand has is reduced, if
        # that operand has every other factor too; otherwise it is looked up, and only the rows that are found are read.
        holders = [i for i, dims in enumerate(rule.operands) if contracted & set(dims)]
        all_of_it = [i for i in holders if set(rule.factors()) <= set(rule.operands[i])]
        if len(holders) > 1:
            products = 2 * sympy.prod(_factor_size(factor, node, rule, share) for factor in rule.factors())
            times = sum(graded[i] for i in holders)
        elif all_of_it:
            others = sympy.prod(shapes[all_of_it[0]]) if floating else 0
        else:
            lookups = set(holders)
            others = elements if floating else 0
    elif rule is None and (at := row.contracts) is not None:
        products, times = 2 * elements * shapes[at][-1], sum(graded[:2])
    else:
        others = elements if floating else 0
    sizes = [
        written if i in lookups else sympy.prod(shape) * _itemsize(operand)
        for i, (operand, shape) in enumerate(zip(operands, shapes, strict=True))
    ]
    logits: Size = 0
    if "makes_logits" in row.facts:
        # The product writes the logits and the loss reads them, one operation for each; their gradient is written over them,
        # and read by two products. Unless the gradients are computed early, the product is made twice.
        others, times = products / (2 * shapes[0][-1]), times + (not is_early(node))
        logits = others * _itemsize(operands[0])
    forward = Work(products, others, sum(sizes) + written + 2 * logits)
    if not any(output.requires_grad for output in results):
        return Compute(forward)
    if products:
        # For each gradient: the result's, what stands beside the operand, and the gradient itself.
        traffic = sum(written + sum(sizes) for needed in graded if needed)
    else:
        # The result's gradient and the operands are read, and the operands' gradients are written.
        traffic = written + sum(sizes) + sum(size for size, needed in zip(sizes, graded, strict=True) if needed)
    return Compute(forward, Work(times * products, others, traffic + (2 + times) * logits))


def of_body(body: Body, share: Share | None = None) -> Compute:
    """What all calls of a body cost together."""
    return _total(of_node(node, share) for node in body.calls())


def of_units(units: Iterable[Unit], share: Share | None = None) -> Compute:
    """What these units cost together; a body that several share is weighed once."""
    known: dict[int, Compute] = {}
    costs = []
    for unit in units:
        if id(unit.body) not in known:
            known[id(unit.body)] = of_body(unit.body, share)
        costs.append(known[id(unit.body)])
    return _total(costs)


def _total(parts: Iterable[Compute]) -> Compute:
    """The sum, each kind added up in one go: sympy's sums of many terms are slow one by one."""
    every = list(parts)

    def add(works: list[Work]) -> Work:
        return Work(*(sympy.Add(*(getattr(work, name) for work in works)) for name in ("products", "others", "bytes")))

    return Compute(add([part.forward for part in every]), add([part.backward for part in every]))


def _is_view(node: fx.Node) -> bool:
    """Whether a call moves nothing: one of several results, or an alias of its operand in the same dtype."""
    if is_item(node):
        return True
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    aliases = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    operands = tensor_arguments(node)
    return aliases and len(operands) > 0 and all(result.dtype == values(operands[0])[0].dtype for result in values(node))


def _rule(node: fx.Node) -> Factoring | None:
    """The rule of a call; the rule of the operator itself where it is a split form."""
    if form_of(node) is None:
        return factoring(node)
    # A split form has no rule of its own: find the operator that it is a form of.
    for rule in RULES.values():
        if rule.line is not None and any(form.function is node.target for form in rule.forms.values()):
            return apply(rule.line, node, rule.forms)
    return None


def _contracted(rule: Factoring) -> set[str]:
    """The factors that no result has."""
    result_factors = {factor for dims in rule.results for factor in dims}
    return {factor for factor in rule.factors() if factor not in result_factors}


def _factor_size(factor: str, node: fx.Node, rule: Factoring, share: Share | None) -> Size:
    """The length of a factor, for a rank where a value that has it is split there."""
    places = [
        (tensor, dim)
        for dims, tensor in [
            *zip(rule.operands, (values(operand)[0] for operand in tensor_arguments(node)), strict=True),
            *zip(rule.results, values(node), strict=False),
        ]
        for dim, name in enumerate(dims)
        if name == factor
    ]
    sizes = [(tensor.shape[dim], _local(tensor, share)[dim]) for tensor, dim in places]
    return next((local for size, local in sizes if not same(size, local)), sizes[0][1])


def _local(tensor: Value, share: Share | None) -> tuple[Size, ...]:
    return tensor.shape if share is None else share.shape(tensor)


def _shape(node: fx.Node, share: Share | None) -> tuple[Size, ...]:
    return _local(values(node)[0], share)


def _itemsize(node: fx.Node) -> int:
    return int(values(node)[0].dtype.itemsize)
