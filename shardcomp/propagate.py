"""Layouts through a body, by the rules: for one axis of the mesh, which factor each call is cut along.

Going forward, each call takes the choice that costs the fewest bytes for the layouts its operands have. Going backward, the law
of gradients marks every operand whose gradient is a partial sum: one that is whole and meets another that is cut or partial.
Nothing is rewritten here; the `tensor` pass turns what was chosen into collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from shardcomp.layout import PARTIAL, WHOLE, Placement, Size, divides, split
from shardcomp.program import PARAMETER, B, Body, S, Value, tensor_arguments
from shardcomp.rules import Factoring, Form, factoring

NOMINAL = {B: 1, S: 2048}
"""Sizes for comparing costs, so that a choice does not depend on the batch."""
_FORBIDDEN = float("inf")
_WEIGHT = 1e6
"""Gathering a weight is always right, but anything else is better."""


@dataclass(frozen=True)
class Choice:
    """How one call is cut on an axis: what its operands must be, what its results are, and the operands whose gradient
    comes out as a partial sum. `ruled` is False where the call has no rule and so runs whole."""

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    partial_gradient: tuple[bool, ...]
    form: Form | None = None
    ruled: bool = True


@dataclass
class Propagation:
    """The choice of every call, the placement of every node's results, and the cuts that the policy asks for but a size
    forbids."""

    choices: dict[fx.Node, Choice]
    placements: dict[fx.Node, tuple[Placement, ...]]
    indivisible: list[Indivisible]
    passed_back: set[fx.Node] = field(default_factory=set)
    """Calls whose result has a partial gradient that is reduced at their operand instead."""


@dataclass(frozen=True)
class Indivisible:
    """A call that cannot keep its operand's cut, because a dimension of `size` does not divide."""

    node: fx.Node
    size: int


@dataclass(frozen=True)
class Cutting:
    """What one axis cuts: into how many pieces, and the length of the sequence where the residual stream is cut along it."""

    parts: int
    length: Size | None


def propagate(body: Body, cutting: Cutting, given: Mapping[fx.Node, Placement]) -> Propagation:
    """Choose for every call of `body` how one axis cuts it, from the placements of its placeholders.

    given: placeholder -> placement; a placeholder that is not named is whole.
    """
    done = Propagation({}, {}, [])
    for node in body.graph.nodes:
        if node.op == "placeholder":
            done.placements[node] = (given.get(node, WHOLE),)
        elif node.op == "call_function":
            operands = tensor_arguments(node)
            current = tuple(_placement(done, operand, node) for operand in operands)
            rule = factoring(node)
            choice = _choose(node, operands, current, rule, cutting)
            if rule is not None:
                done.indivisible += _lost_cuts(node, operands, current, choice, rule, cutting.parts)
            done.choices[node] = choice
            done.placements[node] = choice.results
    _push_back(body, done)
    return done


def _placement(done: Propagation, operand: fx.Node, user: fx.Node) -> Placement:
    found = done.placements[operand]
    if len(found) == 1:
        return found[0]
    index = user.args[1]
    assert isinstance(index, int)
    return found[index]


def values(node: fx.Node) -> tuple[Value, ...]:
    """What is known of a node's results, always as a tuple."""
    found = node.meta["value"]
    return (found,) if isinstance(found, Value) else tuple(found)


def _choose(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring | None, cutting: Cutting
) -> Choice:
    results = len(values(node))
    whole = Choice((WHOLE,) * len(operands), (WHOLE,) * results, (False,) * len(operands), ruled=rule is not None)
    best, least = whole, _cost(whole, operands, current, cutting)
    if rule is None or least == 0:
        return best
    for choice in (*_cuts(node, operands, current, rule, cutting.parts), *_passes(operands, current, rule, results)):
        cost = _cost(choice, operands, current, cutting)
        if cost < least:
            best, least = choice, cost
    return best


def _cuts(node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, n: int) -> Iterator[Choice]:
    """Cutting along each factor in turn."""
    for factor in rule.factors():
        contracted = all(factor not in dims for dims in rule.results)
        form = rule.forms.get(factor)
        if contracted and form is None and (rule.additive or not rule.linear):
            continue
        if any(dims.count(factor) > 1 for dims in (*rule.operands, *rule.results)):
            continue
        sizes = _sizes(operands, node, rule, factor)
        if any(isinstance(size, sympy.Expr) and size.has(B) for size in sizes):
            continue  # samples belong to data parallelism
        if not all(divides(size, n) for size in sizes):
            uneven = len({int(size) for size in sizes}) == 1 and _leaves_none_empty(int(sizes[0]), n)
            already = all(at == _at(dims, factor) for at, dims in zip(current, rule.operands, strict=True) if factor in dims)
            if not (uneven and already):
                continue
        needed = tuple(_at(dims, factor) for dims in rule.operands)
        if form is not None:
            made = (PARTIAL if form.partial else WHOLE,) * len(rule.results)
        else:
            made = tuple(PARTIAL if contracted else _at(dims, factor) for dims in rule.results)
        met = tuple(placement.is_whole for placement in needed)
        yield Choice(needed, made, met, form)


def _passes(operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, results: int) -> Iterator[Choice]:
    """Letting partial operands through an operator that is linear in them."""
    if rule.jointly_linear:
        yield Choice((PARTIAL,) * len(operands), (PARTIAL,) * results, (False,) * len(operands))
    if rule.additive:
        return
    for i in rule.linear:
        needed = tuple(PARTIAL if j == i else WHOLE for j in range(len(operands)))
        yield Choice(needed, (PARTIAL,) * results, tuple(j != i for j in range(len(operands))))


def _at(dims: tuple[str | None, ...], factor: str) -> Placement:
    return split(dims.index(factor)) if factor in dims else WHOLE


def _sizes(operands: list[fx.Node], node: fx.Node, rule: Factoring, factor: str) -> list[Size]:
    shapes = [_operand_value(operand, node).shape for operand in operands] + [v.shape for v in values(node)]
    every = zip((*rule.operands, *rule.results), shapes, strict=True)
    return [shape[dims.index(factor)] for dims, shape in every if factor in dims]


def _operand_value(operand: fx.Node, user: fx.Node) -> Value:
    found = values(operand)
    return found[0] if len(found) == 1 else found[user.args[1]]  # type: ignore[index]


def _leaves_none_empty(size: int, n: int) -> bool:
    """Whether `torch.chunk` gives each of n ranks at least one row."""
    return -(-size // n) * (n - 1) < size


def _cost(choice: Choice, operands: list[fx.Node], current: tuple[Placement, ...], cutting: Cutting) -> float:
    """Bytes that bringing the operands to what a choice needs moves, forward and backward."""
    total = 0.0
    for operand, now, needed, partial in zip(operands, current, choice.operands, choice.partial_gradient, strict=True):
        total += conversion_cost(operand, now, needed, partial, cutting)
    return total


def conversion_cost(operand: fx.Node, now: Placement, needed: Placement, partial_gradient: bool, cutting: Cutting) -> float:
    """Bytes for one operand. An all-reduce counts twice; a whole weight's partial gradient is added up once per step.

    A sum is scattered only to where the residual stream lies: scattered elsewhere it would have to be gathered again.
    """
    held = values(operand)[0]
    weight = operand.op == "placeholder" and operand.meta["role"] == PARAMETER
    size = bytes_of(held)
    if now == needed:
        if now.is_whole and partial_gradient and held.requires_grad and not weight:
            return 2 * size
        return 0.0
    if needed.partial or (now.is_split and not all(divides(d, cutting.parts) for d in _cut_sizes(held, now, needed))):
        return _FORBIDDEN
    if weight:
        return size * _WEIGHT
    if now.is_whole:
        return size if held.requires_grad else 0.0
    if now.partial:
        scattered = needed.dim is not None and cutting.length is not None and held.shape[needed.dim] == cutting.length
        return size * (1 if scattered else 2 if needed.is_whole else 3)
    return size


def _cut_sizes(held: Value, now: Placement, needed: Placement) -> list[Size]:
    return [held.shape[p.dim] for p in (now, needed) if p.dim is not None]


def bytes_of(held: Value) -> float:
    return float(sympy.sympify(held.numel()).subs(NOMINAL)) * held.dtype.itemsize


def _lost_cuts(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], choice: Choice, rule: Factoring, n: int
) -> Iterator[Indivisible]:
    """Operands whose cut this call has a factor for, but a size that does not divide."""
    for operand, now, needed, dims in zip(operands, current, choice.operands, rule.operands, strict=True):
        if operand.op == "placeholder" and operand.meta["role"] == PARAMETER:
            continue  # a weight that does not divide is found where the policy's word is given its meaning
        if now.is_split and needed != now and dims[now.dim] is not None:  # type: ignore[index]
            factor = dims[now.dim]  # type: ignore[index]
            bad = [size for size in _sizes(operands, node, rule, str(factor)) if not divides(size, n)]
            if bad:
                yield Indivisible(node, min(int(size) for size in bad))


def _push_back(body: Body, done: Propagation) -> None:
    """Let a partial gradient pass back through calls that are linear in one operand, so that it is reduced once, not per
    use."""
    for node in reversed(body.graph.nodes):
        choice = done.choices.get(node)
        if choice is None or len(choice.operands) != 1 or not choice.operands[0].is_whole or not choice.results[0].is_whole:
            continue
        rule = factoring(node)
        uses = [(user, i) for user in node.users for i, a in enumerate(tensor_arguments(user)) if a is node]
        graded = [(user, i) for user, i in uses if _flows(user)]
        if rule is None or 0 not in rule.linear or not graded or any(user.op == "output" for user, _ in graded):
            continue
        if all(done.choices[user].operands[i].is_whole and done.choices[user].partial_gradient[i] for user, i in graded):
            done.choices[node] = replace(choice, partial_gradient=(True,))
            done.passed_back.add(node)


def _flows(user: fx.Node) -> bool:
    return user.op == "output" or any(v.requires_grad for v in values(user))
