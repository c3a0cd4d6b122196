"""Layouts through a body, by the rules: for one axis of the mesh, the factor that each call is split along.

Going forward, each call takes the choice that costs the fewest bytes for the layouts that its operands have. The gradient law
marks operands on the way: a replicated operand that meets a sharded, copied or partial one has a partial gradient. Going
backward, a call whose result is only read sharded is split itself where that is cheaper, and partial gradients are let through.
`refine` then tries other choices where something is sent, and keeps what lessens the traffic of the entire body. Nothing is
rewritten here: the `tensor_parallel` pass turns the choices into collectives.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import sympy
from torch import fx

from shardcomp.ir.layout import PARTIAL, REPLICATED, Placement, Size, copied, divides, split
from shardcomp.ir.nodes import has_one_result, is_parameter, operand_value, requires_grad, stored, tensor_arguments, values
from shardcomp.ir.program import B, Body, Value
from shardcomp.sharding.reshard import FORBIDDEN, WEIGHT, bytes_of, is_narrowing, reshard_bytes, reshard_estimate
from shardcomp.sharding.rules import HEADS, Factoring, Form, factoring


@dataclass(frozen=True)
class Choice:
    """How one call is split on an axis.

    operands: the placements that it needs. results: those that it gives. partial_gradient: the operands whose gradient is
    partial. form: the split form that is called instead. has_rule: False where the call has no rule and so runs on replicated
    operands.
    """

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    partial_gradient: tuple[bool, ...]
    form: Form | None = None
    has_rule: bool = True


@dataclass
class Propagation:
    """The choice of every call and the placement of every node's results.

    indivisible: the splits that the policy asks for but a size forbids. stuck: calls that cannot be given what they need.
    passed_back: calls whose result has a partial gradient that is reduced at their operand instead. origins: for every sharded
    value, the parameters that its sharding comes from. resharded: every reshard of a value, which is done once for all calls
    that need it. alternatives: the other choices of the calls for which something is sent. reshard_bytes: what all reshards
    send, see `reshard.reshard_bytes`.
    """

    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    placements: dict[fx.Node, tuple[Placement, ...]] = field(default_factory=dict)
    indivisible: list[Indivisible] = field(default_factory=list)
    stuck: list[fx.Node] = field(default_factory=list)
    passed_back: set[fx.Node] = field(default_factory=set)
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    resharded: set[tuple[fx.Node, Placement, bool]] = field(default_factory=set)
    alternatives: dict[fx.Node, list[Choice]] = field(default_factory=dict)
    reshard_bytes: float = 0.0


@dataclass(frozen=True)
class Indivisible:
    """A call that cannot keep the split of its operand, because a dimension of `size` does not divide."""

    node: fx.Node
    size: int
    origins: frozenset[fx.Node]


@dataclass(frozen=True)
class AxisSplit:
    """What one axis splits: over how many ranks, and the length of the sequence where the residual stream is split along it."""

    ranks: int
    length: Size | None


def propagate(
    body: Body,
    axis_split: AxisSplit,
    placements: Mapping[fx.Node, Placement],
    finals: tuple[bool, ...] = (),
    forced: Mapping[fx.Node, Choice] = MappingProxyType({}),
) -> Propagation:
    """Choose for every call of `body` how one axis splits it, from the placements of its placeholders.

    placements: placeholder -> placement; a placeholder that is not named is replicated. finals: whether each result leaves the
    program, by default none does. forced: call -> the choice it takes where that can be done.
    """
    propagation = Propagation()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            propagation.placements[node] = (placements.get(node, REPLICATED),)
            sharded = propagation.placements[node][0].dim is not None and is_parameter(node)
            propagation.origins[node] = frozenset({node} if sharded else ())
        elif node.op == "call_function":
            operands = tensor_arguments(node)
            current = tuple(_placement(propagation, operand, node) for operand in operands)
            rule = factoring(node)
            possible = _possible_choices(node, operands, current, rule, axis_split)
            costs = [_cost(one, operands, current, axis_split, propagation.resharded) for one in possible]
            # The first of the cheapest: running on replicated operands comes first, so that nothing is split for nothing.
            least = min(range(len(possible)), key=costs.__getitem__)
            choice, cost = possible[least], costs[least]
            if cost > 0:  # something is sent: `refine` tries what else could be done here
                propagation.alternatives[node] = [
                    o for o, c in zip(possible, costs, strict=True) if o is not choice and c < FORBIDDEN
                ]
            # Another forced choice may have changed the operands, so that this one cannot be had any more.
            if node in forced and _cost(forced[node], operands, current, axis_split, propagation.resharded) < FORBIDDEN:
                choice = forced[node]
            if rule is not None:
                propagation.indivisible += _lost_splits(node, operands, choice, rule, axis_split.ranks, propagation)
            if cost == FORBIDDEN:
                propagation.stuck.append(node)
            propagation.choices[node] = choice
            propagation.placements[node] = choice.results
            propagation.origins[node] = _origins(operands, choice, propagation)
            # A later call that needs the same of the same value gets it for nothing.
            propagation.resharded.update(zip(operands, choice.operands, choice.partial_gradient, strict=True))
    # Both go backward over the choices that the loop made, and may change them.
    _split_earlier(body, propagation, axis_split)
    _push_back(body, propagation)
    if not propagation.stuck:
        propagation.reshard_bytes = _total_reshard_bytes(body, propagation, axis_split, finals)
    return propagation


def refine(body: Body, axis_split: AxisSplit, placements: Mapping[fx.Node, Placement], finals: tuple[bool, ...]) -> Propagation:
    """`propagate`, and then other choices, one call at a time, wherever that lessens what the entire body sends."""
    best = propagate(body, axis_split, placements, finals)
    forced: dict[fx.Node, Choice] = {}
    for node in body.calls():  # the choices before it are settled, those after it follow
        for option in best.alternatives.get(node, ()):
            tried = propagate(body, axis_split, placements, finals, {**forced, node: option})
            # Strictly less: of equal programs, the simpler first choice stays.
            if tried.reshard_bytes < best.reshard_bytes and not tried.stuck and not tried.indivisible:
                best, forced = tried, {**forced, node: option}
    return best


def boundary_placement(result: Value, now: Placement, final: bool, axis_split: AxisSplit) -> Placement:
    """The placement of a result when it leaves its unit: sharded along the sequence where it carries a gradient, else
    replicated.

    A result of the program stays sharded where it is, except along the sequence: it has the caller's length.
    """
    if final:
        return now if now.dim is not None and result.shape[now.dim] != axis_split.length else REPLICATED
    if axis_split.length is not None and result.floating and result.requires_grad:
        for dim, size in enumerate(result.shape):
            # Dimension 0 is the batch, even where it is as long as the sequence.
            if dim > 0 and size == axis_split.length:
                return split(dim)
    return REPLICATED


def _total_reshard_bytes(body: Body, propagation: Propagation, axis_split: AxisSplit, finals: tuple[bool, ...]) -> float:
    """What the reshards send that the choices ask for."""
    # By value and need, since a reshard for several calls is made once.
    asked: dict[tuple[fx.Node, Placement, bool], Placement] = {}
    for node, choice in propagation.choices.items():
        graded = requires_grad(node)
        operands = tensor_arguments(node)
        for operand, needed, partial in zip(operands, choice.operands, choice.partial_gradient, strict=True):
            now = _placement(propagation, operand, node)
            summed = partial and graded and needed.is_replicated and operand not in propagation.passed_back
            if now != needed or summed and now.is_replicated:
                asked[operand, needed, summed] = now
    for result, final in zip(body.results, finals or (False,) * len(body.results), strict=True):
        now = propagation.placements[result][0]
        if now != (target := boundary_placement(values(result)[0], now, final, axis_split)):
            asked[result, target, False] = now
    total = 0.0
    for (operand, needed, summed), now in asked.items():
        tensor = values(operand)[0]
        # A replicated weight's partial gradient is reduced with all others once per step, and counts nothing here.
        if stored(operand) is None or now.is_replicated and needed.copies > 1:
            total += reshard_bytes(tensor, now, needed, summed, axis_split.ranks)
        elif now != needed:
            total += WEIGHT * bytes_of(tensor)
    return total


def _origins(operands: list[fx.Node], choice: Choice, propagation: Propagation) -> frozenset[fx.Node]:
    if all(placement.dim is None for placement in choice.results):
        return frozenset()
    origins = [propagation.origins[o] for o, needed in zip(operands, choice.operands, strict=True) if needed.dim is not None]
    return frozenset().union(*origins)


def _placement(propagation: Propagation, operand: fx.Node, user: fx.Node) -> Placement:
    placements = propagation.placements[operand]
    if len(placements) == 1:
        return placements[0]
    index = user.args[1]  # the user is a getitem: its index
    assert isinstance(index, int)
    return placements[index]


def _possible_choices(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring | None, axis_split: AxisSplit
) -> list[Choice]:
    """Every choice for a call, running it on replicated operands first."""
    results = len(values(node))
    replicated = Choice(
        (REPLICATED,) * len(operands), (REPLICATED,) * results, (False,) * len(operands), has_rule=rule is not None
    )
    if any(placement.is_copied for placement in current):
        # Each rank has a summand of the result's gradient, and so of every operand's.
        replicated = replace(
            replicated, results=(copied(axis_split.ranks),) * results, partial_gradient=(True,) * len(operands)
        )
    if rule is None:
        return [replicated]
    return [replicated, *_splits(node, operands, current, rule, axis_split.ranks), *_partial_choices(operands, rule, results)]


def _splits(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, ranks: int
) -> Iterator[Choice]:
    """Splitting along each factor in turn, over all ranks, or with the copies that operands come in."""
    for factor in rule.factors():
        contracted = all(factor not in dims for dims in rule.results)
        # The result would be partial. But every rank would add the bias, and the maximum of a shard is no summand.
        if contracted and factor not in rule.forms and (rule.additive or not rule.linear):
            continue
        # One rank cannot have a shard along two dimensions at once.
        if any(dims.count(factor) > 1 for dims in (*rule.operands, *rule.results)):
            continue
        sizes = _sizes(operands, node, rule, factor)
        if any(isinstance(size, sympy.Expr) and size.has(B) for size in sizes):
            continue  # samples belong to data parallelism
        if (choice := _split_along(node, operands, current, rule, factor, ranks)) is not None:
            yield choice
        # Keys of two heads on four ranks come in two copies. Calls on them alone, such as their rotation, can keep it that way.
        here = zip(current, rule.operands, strict=True)
        copies_here = {p.copies for p, dims in here if p.copies > 1 and p.dim is not None and dims[p.dim] == factor}
        if not contracted and factor not in rule.forms and not rule.coarse and not _is_product(rule, factor):
            for copies in sorted(copies_here):
                if all(divides(size, ranks // copies) for size in sizes):
                    yield _choice(rule, factor, tuple(copies for _ in operands), copies)


def _split_along(
    node: fx.Node, operands: list[fx.Node], current: tuple[Placement, ...], rule: Factoring, factor: str, ranks: int
) -> Choice | None:
    """One shard for each rank; operands that a rule lets have fewer shards have copies of them."""
    copies = [1] * len(operands)
    for i, (operand, dims) in enumerate(zip(operands, rule.operands, strict=True)):
        if i in rule.coarse and factor in dims:
            size = operand_value(operand, node).shape[dims.index(factor)]
            # Fewer key-value heads than ranks: each head goes to several neighbouring ranks.
            if not divides(size, ranks) and ranks % int(size) == 0:
                copies[i] = ranks // int(size)
    few = frozenset(i for i, count in enumerate(copies) if count > 1)
    sizes = _sizes(operands, node, rule, factor, without=few)
    if not all(divides(size, ranks) for size in sizes):
        # A vocabulary that does not divide may stay split as it is, but no collective brings a value into such a split.
        uneven = len({int(size) for size in sizes}) == 1 and _leaves_none_empty(int(sizes[0]), ranks)
        already = all(at == _at(dims, factor) for at, dims in zip(current, rule.operands, strict=True) if factor in dims)
        if not (uneven and already):
            return None
    choice = _choice(rule, factor, tuple(copies), 1)
    # One shard on all ranks is no split: each rank reads all of the operand and gives a summand of its gradient.
    needed = tuple(
        REPLICATED if count == ranks else placement for count, placement in zip(copies, choice.operands, strict=True)
    )
    copies_of = {result: copies[operand] for result, operand in rule.alike.items() if operand in few}
    results = tuple(copied(ranks) if copies_of.get(j) == ranks else placement for j, placement in enumerate(choice.results))
    summed = tuple(placement.is_replicated for placement in needed)
    return replace(choice, operands=needed, results=results, partial_gradient=summed)


def _choice(rule: Factoring, factor: str, copies: tuple[int, ...], result_copies: int) -> Choice:
    """The choice that splits `factor`. copies: for each operand, how many ranks have the same shard."""
    form = rule.forms.get(factor)
    needed = tuple(_at(dims, factor, count) for dims, count in zip(rule.operands, copies, strict=True))
    if form is not None:
        results = (PARTIAL if form.partial else REPLICATED,) * len(rule.results)
    else:
        # The result has a shard of the factor, or a summand where the factor was summed over.
        contracted = all(factor not in dims for dims in rule.results)
        of_results = [copies[rule.alike[j]] if j in rule.alike else result_copies for j in range(len(rule.results))]
        results = tuple(
            PARTIAL if contracted else _at(dims, factor, count) for dims, count in zip(rule.results, of_results, strict=True)
        )
    return Choice(needed, results, tuple(placement.is_replicated for placement in needed), form)


def _is_product(rule: Factoring, factor: str) -> bool:
    """Whether two operands that have the factor are multiplied and summed: in copies, ranks would do the same work."""
    kept_factors = {name for dims in rule.results for name in dims}
    having = [dims for dims in rule.operands if factor in dims]
    return any(
        sum(name in dims for dims in having) > 1 for dims in having for name in dims if name and name not in kept_factors
    )


def _partial_choices(operands: list[fx.Node], rule: Factoring, results: int) -> Iterator[Choice]:
    """Letting partial operands through an operator that is linear in them."""
    # a + b is linear in both together: Σ (aᵢ + bᵢ). With b replicated, each rank would add all of b.
    if rule.jointly_linear:
        yield Choice((PARTIAL,) * len(operands), (PARTIAL,) * results, (False,) * len(operands))
    if rule.additive:
        return
    for i in rule.linear:
        # x W is linear in x alone: Σ (xᵢ W) = (Σ xᵢ) W. The gradient of W is then a sum over ranks as well.
        needed = tuple(PARTIAL if j == i else REPLICATED for j in range(len(operands)))
        yield Choice(needed, (PARTIAL,) * results, tuple(j != i for j in range(len(operands))))


def _at(dims: tuple[str | None, ...], factor: str, copies: int = 1) -> Placement:
    return split(dims.index(factor), copies) if factor in dims else REPLICATED


def _sizes(
    operands: list[fx.Node], node: fx.Node, rule: Factoring, factor: str, without: frozenset[int] = frozenset()
) -> list[Size]:
    """The sizes of a factor in operands and results, except in operands `without` and in results that are placed like them."""
    shapes = [operand_value(operand, node).shape for operand in operands] + [v.shape for v in values(node)]
    without = without | {len(operands) + result for result, operand in rule.alike.items() if operand in without}
    every = enumerate(zip((*rule.operands, *rule.results), shapes, strict=True))
    return [shape[dims.index(factor)] for i, (dims, shape) in every if factor in dims and i not in without]


def _leaves_none_empty(size: int, ranks: int) -> bool:
    """Whether `torch.chunk` gives each of `ranks` ranks at least one row."""
    # Each but the last takes ceil(size / ranks) rows, and something must be left for the last.
    return -(-size // ranks) * (ranks - 1) < size


def _cost(
    choice: Choice,
    operands: list[fx.Node],
    current: tuple[Placement, ...],
    axis_split: AxisSplit,
    resharded: Container[tuple[fx.Node, Placement, bool]],
) -> float:
    """Bytes of the reshards that a choice needs; nothing for those that are done already."""
    total = 0.0
    for operand, now, needed, partial in zip(operands, current, choice.operands, choice.partial_gradient, strict=True):
        if (operand, needed, partial) not in resharded:
            is_weight = stored(operand) is not None
            total += reshard_estimate(values(operand)[0], is_weight, now, needed, partial, axis_split.ranks, axis_split.length)
    return total


def _lost_splits(
    node: fx.Node, operands: list[fx.Node], choice: Choice, rule: Factoring, ranks: int, propagation: Propagation
) -> Iterator[Indivisible]:
    """Operands that lose their split: the call has a factor for it, but a size that does not divide."""
    for i, (operand, needed, dims) in enumerate(zip(operands, choice.operands, rule.operands, strict=True)):
        now = _placement(propagation, operand, node)
        if stored(operand) is not None:
            continue  # a weight that does not divide is found where the policy's word is given its meaning
        # Without an origin the split is not the policy's, such as the split along the sequence.
        if now.dim is None or needed == now or not propagation.origins[operand]:
            continue
        if dims[now.dim] is None:
            # A split through a head: there are fewer heads than ranks.
            heads = operand_value(operand, node).shape[dims.index(HEADS)] if i in rule.coarse and HEADS in dims else 0
            if not divides(heads, ranks // now.copies):
                yield Indivisible(node, int(heads), propagation.origins[operand])
            continue
        shards = ranks // now.copies
        bad = [size for size in _sizes(operands, node, rule, str(dims[now.dim])) if not divides(size, shards)]
        if bad and not is_narrowing(operand_value(operand, node), now, needed, ranks):
            yield Indivisible(node, min(int(size) for size in bad), propagation.origins[operand])


def _split_earlier(body: Body, propagation: Propagation, axis_split: AxisSplit) -> None:
    """Split a call whose replicated result every reader wants sharded, where resharding its operands costs less than resharding
    its result: a table of positions is looked up for a rank's own tokens only."""
    for node in reversed(body.graph.nodes):
        choice = propagation.choices.get(node)
        if choice is None or len(choice.results) != 1 or not choice.results[0].is_replicated or not _flows(node):
            continue
        uses = [(user, i) for user in node.users for i, a in enumerate(tensor_arguments(user)) if a is node]
        # What leaves the unit has the placement of a boundary.
        if any(user.op == "output" for user, _ in uses):
            continue
        placements_read = {propagation.choices[user].operands[i] for user, i in uses}
        rule = factoring(node)
        [target] = placements_read if len(placements_read) == 1 else [REPLICATED]
        if rule is None or target.dim is None or target.copies > 1 or (factor := rule.results[0][target.dim]) is None:
            continue
        operands = tensor_arguments(node)
        current = tuple(_placement(propagation, operand, node) for operand in operands)
        split_choice = next(
            (c for c in _splits(node, operands, current, rule, axis_split.ranks) if c.results == (split(target.dim),)), None
        )
        if split_choice is None or factor in rule.forms:
            continue
        here = reshard_estimate(values(node)[0], False, REPLICATED, target, False, axis_split.ranks, axis_split.length)
        if _cost(split_choice, operands, current, axis_split, ()) < _cost(choice, operands, current, axis_split, ()) + here:
            propagation.choices[node], propagation.placements[node] = split_choice, split_choice.results


def _push_back(body: Body, propagation: Propagation) -> None:
    """Let a partial gradient pass back through calls with one operand that has a gradient, so that it is reduced once, not per
    use, and a weight's with the other weights'. A backward is linear in the gradient that it is given, whatever the call."""
    for node in reversed(body.graph.nodes):
        if node not in propagation.choices:
            continue
        if _may_pass(node, propagation):
            passed = tuple(values(operand)[0].requires_grad for operand in tensor_arguments(node))
            propagation.choices[node] = replace(propagation.choices[node], partial_gradient=passed)
            propagation.passed_back.add(node)
        elif not has_one_result(node):
            for item in propagation.passed_back & set(node.users):  # they led here, and no further
                propagation.choices[item] = replace(propagation.choices[item], partial_gradient=(False,))
                propagation.passed_back.remove(item)


def _may_pass(node: fx.Node, propagation: Propagation) -> bool:
    """Whether a partial gradient of a call's result may become one of its operand."""
    choice = propagation.choices[node]
    if not all(placement.is_replicated for placement in (*choice.operands, *choice.results[:1])):
        return False
    operands = tensor_arguments(node)
    passed = [values(operand)[0].requires_grad for operand in operands]
    uses = [(user, i) for user in node.users for i, a in enumerate(tensor_arguments(user)) if a is node]
    graded = [(user, i) for user, i in uses if _flows(user)]
    if factoring(node) is None or sum(passed) != 1 or not graded or any(user.op == "output" for user, _ in graded):
        return False
    # A slice's gradient is smaller than that of what it was cut from, and so cheaper to reduce.
    if bytes_of(values(node)[0]) < bytes_of(values(operands[passed.index(True)])[0]):
        return False
    return all(
        propagation.choices[user].operands[i].is_replicated and propagation.choices[user].partial_gradient[i]
        for user, i in graded
    )


def _flows(user: fx.Node) -> bool:
    return user.op == "output" or requires_grad(user)
