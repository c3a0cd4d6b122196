"""Which weights are split together: column and row pairs, found by following factors through a unit's graph.

Two dimensions belong together where a rule gives them one factor: to split one is to split the other. What belongs together and
does not reach a boundary of the unit can be split without anyone outside knowing, as the heads of an attention and the features
of an MLP are: weights that make it are split by columns, weights that contract it by rows. Embedding and head are split by
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from shardcomp.ir.layout import same
from shardcomp.ir.nodes import path_of, stored, tensor_arguments, value, values
from shardcomp.ir.program import INPUT, PARAMETER, Body, Program
from shardcomp.policy.auto.layers import head, lookups
from shardcomp.sharding.rules import factoring
from shardcomp.sharding.weight_dims import dimensions, key_value_weights

Place = tuple[fx.Node, int, int]
"""A dimension of one of a call's results: (call, result, dimension)."""


@dataclass
class _Family:
    """The parameters that are split together: the placeholder of each, and the dimension that is split."""

    dims: dict[fx.Node, int] = field(default_factory=dict)
    at_boundary: bool = False

    @property
    def elements(self) -> int:
        return sum(math.prod(int(size) for size in value(node).shape) for node in self.dims)


def words(program: Program) -> dict[str, str]:
    """Module path -> word of a policy, for a Program of units; modules whose weights stay replicated are absent."""
    words_of: dict[str, str] = {}
    chosen: dict[int, dict[fx.Node, str]] = {}
    vocabulary = _vocabulary(program)
    for unit in program.units:
        if id(unit.body) not in chosen:
            chosen[id(unit.body)] = _body_words(unit.body)
        for node, name in zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True):
            word = "vocab" if name in vocabulary else chosen[id(unit.body)].get(node)
            if word is not None:
                words_of.setdefault(program.parameters[name].module, word)
    return words_of


def _vocabulary(program: Program) -> set[str]:
    """The parameters that are looked up with the tokens, or make the logits of the loss."""
    names_in_vocabulary: set[str] = set()
    for unit in program.units:
        names = dict(zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True))
        calls = list(unit.body.calls())
        for table in lookups(calls):
            names_in_vocabulary.add(names[table])
        for product in head(calls):
            names_in_vocabulary |= {names[weight] for argument in product.args if (weight := stored(argument)) is not None}
    return names_in_vocabulary


def _body_words(body: Body) -> dict[fx.Node, str]:
    """Placeholder -> word for the weights of a unit, the heaviest family first; a weight is split along one dimension only."""
    taken: dict[fx.Node, str] = {}
    for family in sorted(_families(body), key=lambda group: -group.elements):
        words_of = {node: word for node, dim in family.dims.items() if (word := _word(node, dim)) is not None}
        matrices = {word for node, word in words_of.items() if len(value(node).shape) > 1}
        modules = {(path_of(node).rpartition(".")[0], word) for node, word in words_of.items()}
        said_once = len(modules) == len({module for module, _ in modules})
        if not family.at_boundary and matrices == {"colwise", "rowwise"} and said_once and not words_of.keys() & taken.keys():
            taken |= words_of
    return taken


def _word(weight: fx.Node, dim: int) -> str | None:
    """The word that splits this dimension of a weight."""
    dims = tuple(range(len(value(weight).shape)))
    return next((w for w in ("colwise", "rowwise") if next(dimensions(weight, w, dims), None) == dim), None)


def _families(body: Body) -> Iterator[_Family]:
    """The parameters of a unit by what is split together."""
    # Join the dimensions that share a factor in any call; what is joined with a dimension of a weight is split with it.
    together = _Together()
    for node in body.calls():
        for places in _same_factor(node):
            together.join(places)
    for attention, weight, heads in key_value_weights(body):
        dim = next(dimensions(weight, "colwise", tuple(range(_rank(weight)))), None)
        if heads == 1 and dim is not None:  # the ranks that the queries' heads are split over have copies of it
            together.join([(weight, 0, dim), (attention, 0, 1)])
    families: dict[Place, _Family] = {}
    for weight in body.placeholders(PARAMETER):
        for dim in range(_rank(weight)):
            families.setdefault(together.root((weight, 0, dim)), _Family()).dims[weight] = dim
    for node in (*body.placeholders(INPUT), *body.results):
        for dim in range(_rank(node)) if value(node).requires_grad else ():
            if (root := together.root((node, 0, dim))) in families:
                families[root].at_boundary = True
    yield from families.values()


def _same_factor(node: fx.Node) -> Iterator[list[Place]]:
    """For each factor of a call, the dimensions that have it. A dimension that the call cannot split, and gives back
    in the same place, stays one as well, as the features of a norm do: the weights around it are split, and it is gathered
    for the call."""
    rule = factoring(node)
    if rule is None:
        return
    places: dict[str, list[Place]] = {}
    for operand, dims in zip(tensor_arguments(node), rule.operands, strict=True):
        index = 0 if len(values(operand)) == 1 else int(node.args[1])  # type: ignore[call-overload]
        for dim, factor in enumerate(dims):
            if factor is not None:
                places.setdefault(factor, []).append((operand, index, dim))
    for index, dims in enumerate(rule.results):
        for dim, factor in enumerate(dims):
            if factor is not None:
                places.setdefault(factor, []).append((node, index, dim))
    yield from places.values()
    first, results = tensor_arguments(node)[:1], values(node)
    if len(first) == len(results) == 1 and len(values(first[0])) == 1:
        before, after = value(first[0]).shape, results[0].shape
        for dim, (factor_read, factor_made) in enumerate(zip(rule.operands[0], rule.results[0], strict=False)):
            if factor_read is factor_made is None and len(before) == len(after) and same(before[dim], after[dim]):
                yield [(first[0], 0, dim), (node, 0, dim)]


def _rank(node: fx.Node) -> int:
    return len(value(node).shape)


class _Together:
    """Disjoint sets of dimensions."""

    def __init__(self) -> None:
        self.parent: dict[Place, Place] = {}

    def root(self, place: Place) -> Place:
        """The representative of all that are joined with `place`."""
        while (parent := self.parent.get(place, place)) != place:
            self.parent[place] = self.parent.get(parent, parent)  # halves the way for the next time
            place = parent
        return place

    def join(self, places: list[Place]) -> None:
        """Put these and all that they are joined with into one set."""
        first = self.root(places[0])
        for place in places[1:]:
            self.parent[self.root(place)] = first
