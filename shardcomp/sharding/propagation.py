"""Layouts through a body, by the rules: for one axis of the mesh, which factor each call is cut along.

Going forward, each call takes the choice that costs the fewest bytes for the layouts its operands have, and marks, by the law
of gradients, every operand whose gradient is a partial sum: one that is whole and meets another that is cut, copied or partial.
Going backward, calls whose result is only wanted cut are cut themselves where that is cheaper, and partial gradients are let
through. `improve` then tries other choices where something is sent, and keeps what lessens the traffic of the whole body.
Nothing is rewritten here; the `tensor` pass turns what was chosen into collectives.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import sympy
from torch import fx

from shardcomp.ir.layout import PARTIAL, WHOLE, Placement, Size, copied, divides, split
from shardcomp.ir.program import PARAMETER, B, Body, Value, stored, tensor_arguments, values
from shardcomp.sharding.reshard import bytes_of, reshard_bytes
from shardcomp.sharding.rules import HEADS, Factoring, Form, factoring

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
    has_rule: bool = True


@dataclass
class Propagation:
    """The choice of every call and the placement of every node's results.

    indivisible: the cuts that the policy asks for but a size forbids. stuck: calls that cannot be given what they need.
    passed_back: calls whose result has a partial gradient that is reduced at their operand instead.
    origins: for every value that is cut, the parameters whose cut it has. brought: every value that is brought to another
    placement, which is done once for all calls that need it there. alternatives: what else could be done at the calls for which
    something is sent. traffic: what all of it sends, see `conversion.reshard_bytes`.
    """

    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    placements: dict[fx.Node, tuple[Placement, ...]] = field(default_factory=dict)
    indivisible: list[Indivisible] = field(default_factory=list)
    stuck: list[fx.Node] = field(default_factory=list)
    passed_back: set[fx.Node] = field(default_factory=set)
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    brought: set[tuple[fx.Node, Placement, bool]] = field(default_factory=set)
    alternatives: dict[fx.Node, list[Choice]] = field(default_factory=dict)
    reshard_bytes: float = 0.0


@dataclass(frozen=True)
class Indivisible:
    """A call that cannot keep its operand's cut, because a dimension of `size` does not divide."""

    node: fx.Node
    size: int
    origins: frozenset[fx.Node]


@dataclass(frozen=True)
class AxisSplit:
    """What one axis cuts: into how many pieces, and the length of the sequence where the residual stream is cut along it."""

    parts: int
    length: Size | None


def propagate(
    body: Body,
    cutting: AxisSplit,
    given: Mapping[fx.Node, Placement],
    finals: tuple[bool, ...] = (),
    forced: Mapping[fx.Node, Choice] = MappingProxyType({}),
) -> Propagation:
    """Choose for every call of `body` how one axis cuts it, from the placements of its placeholders.

    given: placeholder -> placement; a placeholder that is not named is whole. finals: whether each result leaves the program,
    by default none does. forced: call -> the choice it takes where that can be done.
    """
    done = Propagation()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            done.placements[node] = (given.get(node, WHOLE),)
            cut = done.placements[node][0].dim is not None and node.meta["role"] == PARAMETER
            done.origins[node] = frozenset({node} if cut else ())
        elif node.op == "call_function":
            operands = tensor_arguments(node)
            current = tuple(_placement(done, operand, node) for operand in operands)
            rule = factoring(node)
            options = _options(node, operands, current, rule, cutting)
            costs = [_cost(option, operands, current, cutting, done.brought) for option in options]
            least = min(range(len(options)), key=costs.__getitem__)  # the first of them
            choice, cost = options[least], costs[least]
            if cost > 0:
                done.alternatives[node] = [o for o, c in zip(options, costs, strict=True) if o is not choice and c < _FORBIDDEN]
            if node in forced and _cost(forced[node], operands, current, cutting, done.brought) < _FORBIDDEN:
                choice = forced[node]
            if rule is not None:
                done.indivisible += _lost_cuts(node, operands, choice, rule, cutting.parts, done)
            if cost == _FORBIDDEN:
                done.stuck.append(node)
            done.choices[node] = choice
            done.placements[node] = choice.results
            done.origins[node] = _origins(operands, choice, done)
            done.brought.update(zip(operands, choice.operands, choice.partial_gradient, strict=True))
    _cut_earlier(body, done, cutting)
    _push_back(body, done)
    if not done.stuck:
        done.reshard_bytes = _total_reshard_bytes(body, done, cutting, finals)
    return done


def refine(body: Body, cutting: AxisSplit, given: Mapping[fx.Node, Placement], finals: tuple[bool, ...]) -> Propagation:
    """`propagate`, and then other choices, one call at a time, wherever that lessens what the whole body sends."""
    best = propagate(body, cutting, given, finals)
    forced: dict[fx.Node, Choice] = {}
    for node in body.calls():  # the choices before it are settled, those after it follow
        for option in best.alternatives.get(node, ()):
            tried = propagate(body, cutting, given, finals, {**forced, node: option})
            if tried.reshard_bytes < best.reshard_bytes and not tried.stuck and not tried.indivisible:
                best, forced = tried, {**forced, node: option}
    return best


def boundary_placement(held: Value, now: Placement, final: bool, cutting: AxisSplit) -> Placement:
    """Where a result lies when it leaves its unit: the sequence is cut where it carries a gradient, all else is whole.

    A result of the program stays cut where it is cut, but for the sequence: it has the caller's length.
    """
    if final:
        return now if now.dim is not None and held.shape[now.dim] != cutting.length else WHOLE
    if cutting.length is not None and held.floating and held.requires_grad:
        for dim, size in enumerate(held.shape):
            if dim > 0 and size == cutting.length:
                return split(dim)
    return WHOLE


def _total_reshard_bytes(body: Body, done: Propagation, cutting: AxisSplit, finals: tuple[bool, ...]) -> float:
    """What the conversions send that the choices ask for."""
    asked: dict[tuple[fx.Node, Placement, bool], Placement] = {}
    for node, choice in done.choices.items():
        graded = any(v.requires_grad for v in values(node))
        operands = tensor_arguments(node)
        for operand, needed, partial in zip(operands, choice.operands, choice.partial_gradient, strict=True):
            now = _placement(done, operand, node)
            summed = partial and graded and needed.is_whole and operand not in done.passed_back
            if now != needed or summed and now.is_whole:
                asked[operand, needed, summed] = now
    for result, final in zip(body.results, finals or (False,) * len(body.results), strict=True):
        now = done.placements[result][0]
        if now != (target := boundary_placement(values(result)[0], now, final, cutting)):
            asked[result, target, False] = now
    total = 0.0
    for (operand, needed, summed), now in asked.items():
        held = values(operand)[0]
        if stored(operand) is None or now.is_whole and needed.copies > 1:
            total += reshard_bytes(held, now, needed, summed, cutting.parts)
        elif now != needed:
            total += _WEIGHT * bytes_of(held)
    return total


def _origins(operands: list[fx.Node], choice: Choice, done: Propagation) -> frozenset[fx.Node]:
    if all(placement.dim is None for placement in choice.results):
        return frozenset()
    cut = [done.origins[o] for o, needed in zip(operands, choice.operands, strict=True) if needed.dim is not None]
    return frozenset().union(*cut)


def _placement(done: Propagation, operand: fx.Node, user: fx.Node) -> Placement:
    found = done.placements[operand]
    if len(found) == 1:
        return found[0]
    index = user.args[1]
    assert isinstance(index, int)
    return found[index]


def _options(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring | None, cutting: AxisSplit
) -> list[Choice]:
    """Everything that can be done at a call, running it whole first."""
    results = len(values(node))
    whole = Choice((WHOLE,) * len(operands), (WHOLE,) * results, (False,) * len(operands), has_rule=rule is not None)
    if any(placement.is_copied for placement in current):
        # Each rank has a summand of the result's gradient, and so of every operand's.
        whole = replace(whole, results=(copied(cutting.parts),) * results, partial_gradient=(True,) * len(operands))
    if rule is None:
        return [whole]
    return [whole, *_cuts(node, operands, current, rule, cutting.parts), *_passes(operands, rule, results)]


def _cuts(node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, n: int) -> Iterator[Choice]:
    """Cutting along each factor in turn, into as many pieces as there are ranks or into those that operands come in."""
    for factor in rule.factors():
        contracted = all(factor not in dims for dims in rule.results)
        if contracted and factor not in rule.forms and (rule.additive or not rule.linear):
            continue
        if any(dims.count(factor) > 1 for dims in (*rule.operands, *rule.results)):
            continue
        sizes = _sizes(operands, node, rule, factor)
        if any(isinstance(size, sympy.Expr) and size.has(B) for size in sizes):
            continue  # samples belong to data parallelism
        if (choice := _cut(node, operands, current, rule, factor, n)) is not None:
            yield choice
        here = zip(current, rule.operands, strict=True)
        held = {p.copies for p, dims in here if p.copies > 1 and p.dim is not None and dims[p.dim] == factor}
        if not contracted and factor not in rule.forms and not rule.coarse and not _is_product(rule, factor):
            for copies in sorted(held):
                if all(divides(size, n // copies) for size in sizes):
                    yield _choice(rule, factor, tuple(copies for _ in operands), copies)


def _cut(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, factor: str, n: int
) -> Choice | None:
    """One piece for each rank; operands that a rule lets have fewer are held in copies."""
    copies = [1] * len(operands)
    for i, (operand, dims) in enumerate(zip(operands, rule.operands, strict=True)):
        if i in rule.coarse and factor in dims:
            size = _operand_value(operand, node).shape[dims.index(factor)]
            if not divides(size, n) and n % int(size) == 0:
                copies[i] = n // int(size)
    few = frozenset(i for i, held in enumerate(copies) if held > 1)
    sizes = _sizes(operands, node, rule, factor, without=few)
    if not all(divides(size, n) for size in sizes):
        uneven = len({int(size) for size in sizes}) == 1 and _leaves_none_empty(int(sizes[0]), n)
        already = all(at == _at(dims, factor) for at, dims in zip(current, rule.operands, strict=True) if factor in dims)
        if not (uneven and already):
            return None
    choice = _choice(rule, factor, tuple(copies), 1)
    whole = tuple(WHOLE if held == n else placement for held, placement in zip(copies, choice.operands, strict=True))
    held_of = {result: copies[operand] for result, operand in rule.alike.items() if operand in few}
    results = tuple(copied(n) if held_of.get(j) == n else placement for j, placement in enumerate(choice.results))
    return replace(choice, operands=whole, results=results, partial_gradient=tuple(placement.is_whole for placement in whole))


def _choice(rule: Factoring, factor: str, copies: tuple[int, ...], made_copies: int) -> Choice:
    """The choice that cuts `factor`, each operand that has it held in so many copies."""
    form = rule.forms.get(factor)
    needed = tuple(_at(dims, factor, held) for dims, held in zip(rule.operands, copies, strict=True))
    if form is not None:
        made = (PARTIAL if form.partial else WHOLE,) * len(rule.results)
    else:
        contracted = all(factor not in dims for dims in rule.results)
        of_results = [copies[rule.alike[j]] if j in rule.alike else made_copies for j in range(len(rule.results))]
        made = tuple(
            PARTIAL if contracted else _at(dims, factor, held) for dims, held in zip(rule.results, of_results, strict=True)
        )
    return Choice(needed, made, tuple(placement.is_whole for placement in needed), form)


def _is_product(rule: Factoring, factor: str) -> bool:
    """Whether two operands that have the factor are multiplied and summed: in copies, ranks would do the same work."""
    made = {name for dims in rule.results for name in dims}
    having = [dims for dims in rule.operands if factor in dims]
    return any(sum(name in dims for dims in having) > 1 for dims in having for name in dims if name and name not in made)


def _passes(operands: list[fx.Node], rule: Factoring, results: int) -> Iterator[Choice]:
    """Letting partial operands through an operator that is linear in them."""
    if rule.jointly_linear:
        yield Choice((PARTIAL,) * len(operands), (PARTIAL,) * results, (False,) * len(operands))
    if rule.additive:
        return
    for i in rule.linear:
        needed = tuple(PARTIAL if j == i else WHOLE for j in range(len(operands)))
        yield Choice(needed, (PARTIAL,) * results, tuple(j != i for j in range(len(operands))))


def _at(dims: tuple[str | None, ...], factor: str, copies: int = 1) -> Placement:
    return split(dims.index(factor), copies) if factor in dims else WHOLE


def _sizes(
    operands: list[fx.Node], node: fx.Node, rule: Factoring, factor: str, without: frozenset[int] = frozenset()
) -> list[Size]:
    """The sizes of a factor in the operands, but for those `without`, and in the results, but for those that lie as these."""
    shapes = [_operand_value(operand, node).shape for operand in operands] + [v.shape for v in values(node)]
    without = without | {len(operands) + result for result, operand in rule.alike.items() if operand in without}
    every = enumerate(zip((*rule.operands, *rule.results), shapes, strict=True))
    return [shape[dims.index(factor)] for i, (dims, shape) in every if factor in dims and i not in without]


def _operand_value(operand: fx.Node, user: fx.Node) -> Value:
    found = values(operand)
    return found[0] if len(found) == 1 else found[user.args[1]]  # type: ignore[index]


def _leaves_none_empty(size: int, n: int) -> bool:
    """Whether `torch.chunk` gives each of n ranks at least one row."""
    return -(-size // n) * (n - 1) < size


def _cost(
    choice: Choice,
    operands: list[fx.Node],
    current: tuple[Placement, ...],
    cutting: AxisSplit,
    brought: Container[tuple[fx.Node, Placement, bool]],
) -> float:
    """Bytes that bringing the operands to what a choice needs moves; nothing for what is brought there already."""
    total = 0.0
    for operand, now, needed, partial in zip(operands, current, choice.operands, choice.partial_gradient, strict=True):
        if (operand, needed, partial) not in brought:
            total += conversion_cost(operand, now, needed, partial, cutting)
    return total


def conversion_cost(operand: fx.Node, now: Placement, needed: Placement, partial_gradient: bool, cutting: AxisSplit) -> float:
    """Bytes for one operand. An all-reduce counts twice; a whole weight's partial gradient is added up once per step.

    A sum is scattered only to where the residual stream lies: scattered elsewhere it would have to be gathered again.
    """
    held = values(operand)[0]
    weight = stored(operand) is not None
    size = bytes_of(held)
    if now == needed:
        if now.is_whole and partial_gradient and held.requires_grad and not weight:
            return 2 * size
        return 0.0
    if now.is_copied and needed.is_whole:
        return 0.0 if partial_gradient or not held.requires_grad else _FORBIDDEN
    if now.copies > needed.copies and not needed.partial and needed.dim is not None:
        return 1.0 if is_narrowing(held, now, needed, cutting.parts) else _FORBIDDEN
    if now.is_whole and needed.dim is not None and needed.copies > 1:
        fits = divides(held.shape[needed.dim], cutting.parts // needed.copies)
        return (2 * size if held.requires_grad else 0.0) if fits else _FORBIDDEN
    if now.copies > 1 or needed.copies > 1 or needed.partial:
        return _FORBIDDEN
    if now.is_split and not all(divides(d, cutting.parts) for d in _cut_sizes(held, now, needed)):
        return _FORBIDDEN
    if weight:
        return size * _WEIGHT
    if now.is_whole:
        return size if held.requires_grad else 0.0
    if now.partial:
        scattered = needed.dim is not None and cutting.length is not None and held.shape[needed.dim] == cutting.length
        return size * (1 if scattered else 2 if needed.is_whole else 3)
    return size


def is_narrowing(held: Value, now: Placement, needed: Placement, parts: int) -> bool:
    """Whether a rank finds the piece that is needed within the piece that it has."""
    if needed.dim is None or now.dim not in (None, needed.dim) or now.copies % needed.copies:
        return False
    return divides(held.shape[needed.dim], parts // needed.copies)


def _cut_sizes(held: Value, now: Placement, needed: Placement) -> list[Size]:
    return [held.shape[p.dim] for p in (now, needed) if p.dim is not None]


def _lost_cuts(
    node: fx.Node, operands: list[fx.Node], choice: Choice, rule: Factoring, n: int, done: Propagation
) -> Iterator[Indivisible]:
    """Operands whose cut this call has a factor for, but a size that does not divide."""
    for i, (operand, needed, dims) in enumerate(zip(operands, choice.operands, rule.operands, strict=True)):
        now = _placement(done, operand, node)
        if stored(operand) is not None:
            continue  # a weight that does not divide is found where the policy's word is given its meaning
        if now.dim is None or needed == now or not done.origins[operand]:
            continue
        if dims[now.dim] is None:
            # A head that is cut through: there are fewer heads than ranks.
            heads = _operand_value(operand, node).shape[dims.index(HEADS)] if i in rule.coarse and HEADS in dims else 0
            if not divides(heads, n // now.copies):
                yield Indivisible(node, int(heads), done.origins[operand])
            continue
        pieces = n // now.copies
        bad = [size for size in _sizes(operands, node, rule, str(dims[now.dim])) if not divides(size, pieces)]
        if bad and not is_narrowing(_operand_value(operand, node), now, needed, n):
            yield Indivisible(node, min(int(size) for size in bad), done.origins[operand])


def _cut_earlier(body: Body, done: Propagation, cutting: AxisSplit) -> None:
    """Cut a call whose whole result is wanted cut by all who read it, where its operands cost less than its result would: a
    table of positions is looked up for a rank's own tokens alone."""
    for node in reversed(body.graph.nodes):
        choice = done.choices.get(node)
        if choice is None or len(choice.results) != 1 or not choice.results[0].is_whole or not _flows(node):
            continue
        uses = [(user, i) for user in node.users for i, a in enumerate(tensor_arguments(user)) if a is node]
        if any(user.op == "output" for user, _ in uses):
            continue
        wanted = {done.choices[user].operands[i] for user, i in uses}
        rule = factoring(node)
        [target] = wanted if len(wanted) == 1 else [WHOLE]
        if rule is None or target.dim is None or target.copies > 1 or (factor := rule.results[0][target.dim]) is None:
            continue
        operands = tensor_arguments(node)
        current = tuple(_placement(done, operand, node) for operand in operands)
        cut = next((c for c in _cuts(node, operands, current, rule, cutting.parts) if c.results == (split(target.dim),)), None)
        if cut is None or factor in rule.forms:
            continue
        here = conversion_cost(node, WHOLE, target, False, cutting)
        if _cost(cut, operands, current, cutting, ()) < _cost(choice, operands, current, cutting, ()) + here:
            done.choices[node], done.placements[node] = cut, cut.results


def _push_back(body: Body, done: Propagation) -> None:
    """Let a partial gradient pass back through calls with one operand that has a gradient, so that it is reduced once, not per
    use, and a weight's with the other weights'. A backward is linear in the gradient that it is given, whatever the call."""
    for node in reversed(body.graph.nodes):
        if node not in done.choices:
            continue
        if _may_pass(node, done):
            passed = tuple(values(operand)[0].requires_grad for operand in tensor_arguments(node))
            done.choices[node] = replace(done.choices[node], partial_gradient=passed)
            done.passed_back.add(node)
        elif not isinstance(node.meta["value"], Value):
            for item in done.passed_back & set(node.users):  # they led here, and no further
                done.choices[item] = replace(done.choices[item], partial_gradient=(False,))
                done.passed_back.remove(item)


def _may_pass(node: fx.Node, done: Propagation) -> bool:
    """Whether a partial gradient of a call's result may become one of its operand."""
    choice = done.choices[node]
    if not all(placement.is_whole for placement in (*choice.operands, *choice.results[:1])):
        return False
    operands = tensor_arguments(node)
    passed = [values(operand)[0].requires_grad for operand in operands]
    uses = [(user, i) for user in node.users for i, a in enumerate(tensor_arguments(user)) if a is node]
    graded = [(user, i) for user, i in uses if _flows(user)]
    if factoring(node) is None or sum(passed) != 1 or not graded or any(user.op == "output" for user, _ in graded):
        return False
    if bytes_of(values(node)[0]) < bytes_of(values(operands[passed.index(True)])[0]):
        return False
    return all(done.choices[user].operands[i].is_whole and done.choices[user].partial_gradient[i] for user, i in graded)


def _flows(user: fx.Node) -> bool:
    return user.op == "output" or any(v.requires_grad for v in values(user))
