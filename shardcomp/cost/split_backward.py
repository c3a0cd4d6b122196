"""Which stages can compute the gradients of their inputs and of their weights at different times.

The second half of a split backward runs from the first operators that a weight and what is received meet in, back to the
weight. A weight that is used again behind its own result leads it through operators of the first half, whose saved values are
gone. And where parameters are put back in pieces in between, it may read none. A product of a weight and something received
does not: what it reads for the weight's gradient is the other operand. `w * w` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from shardcomp.ir.program import INPUT, PARAMETER, Program, Unit, tensor_arguments, values
from shardcomp.kernels.embedding import vocab_embedding
from shardcomp.kernels.linear_cross_entropy import is_early, linear_cross_entropy, vocab_linear_cross_entropy
from shardcomp.passes.recompute import passes_on
from shardcomp.sharding.rules import factoring

aten = torch.ops.aten
_PRODUCTS = {aten.linear, aten.mm, aten.bmm, aten.addmm, aten.matmul, aten.mul}
"""Their gradient by one factor reads the other alone."""
_INDIFFERENT = {aten.embedding, aten.index, vocab_embedding}
"""Their backward reads no weight."""
_MAYBE_EARLY = {linear_cross_entropy, vocab_linear_cross_entropy}
"""Nor does theirs where their forward computes the gradients."""
_PIECES = {aten.split, aten.chunk, aten.split_with_sizes, aten.unbind}
"""Their results lie in the memory of their operand."""


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from.

    received: whether a gradient flows from it to the stage before. weights: the trained parameters that it depends on.
    stored: the parameters that are put back in pieces and in whose memory it may lie; those of one dimension are left out,
    since code computes with copies of them (see `Home`).
    """

    received: bool = False
    weights: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()


def obstacle(program: Program, stage: int, reshard: bool) -> str | None:
    """Why the backward of a stage cannot be split, None where it can. A stage whose inputs need no gradient is not split.
    reshard: whether parameters are put back in pieces between the forward and the backward."""
    origins = {name: _Origin(received=True) for name in program.received(stage) if program.values[name].requires_grad}
    if not origins:
        return None
    for unit in program.in_stages((stage,)):
        found = _walk(program, unit, origins, reshard)
        if found is not None:
            return f"{unit.path}: {found}"
    return None


def _walk(program: Program, unit: Unit, origins: dict[str, _Origin], reshard: bool) -> str | None:
    """Go through a unit, and note where its results come from."""
    known: dict[fx.Node, _Origin] = {}
    for node, name in zip(unit.body.placeholders(INPUT), unit.inputs, strict=True):
        known[node] = origins.get(name, _Origin())
    for node, name in zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True):
        parameter = program.parameters[name]
        mine, none = frozenset({name}), frozenset[str]()
        stored = mine if reshard and len(parameter.shape) > 1 else none
        known[node] = _Origin(weights=mine if parameter.requires_grad else none, stored=stored)
    for node in unit.body.calls():
        operands = tensor_arguments(node)
        fault = _fault(node, operands, known)
        if fault is not None:
            return fault
        known[node] = _result(node, operands, known)
    origins.update({name: known[node] for name, node in zip(unit.outputs, unit.body.results, strict=True) if node in known})
    return None


def _result(node: fx.Node, operands: list[fx.Node], known: Mapping[fx.Node, _Origin]) -> _Origin:
    given = [known[each] for each in operands if each in known]
    packet = getattr(node.target, "overloadpacket", node.target)
    lies_there = len(operands) == 1 and given and (packet in _PIECES or passes_on(node))
    stored = given[0].stored if lies_there else frozenset[str]()
    if not any(held.requires_grad for held in values(node)):
        return _Origin(stored=stored)
    return _Origin(any(each.received for each in given), frozenset[str]().union(*(each.weights for each in given)), stored)


def _fault(node: fx.Node, operands: list[fx.Node], known: Mapping[fx.Node, _Origin]) -> str | None:
    """What a call does that a split backward cannot."""
    given = [known.get(each, _Origin()) for each in operands]
    from_weights = [i for i, each in enumerate(given) if each.weights and not each.received]
    used = frozenset[str]().union(*(given[i].weights for i in from_weights))
    again = used & frozenset[str]().union(*(each.weights for each in given if each.received))
    if again:
        return f"{min(again)} is used again behind its own result"
    packet = getattr(node.target, "overloadpacket", node.target)
    reads_none = packet in _INDIFFERENT | _PIECES or packet in _MAYBE_EARLY and is_early(node)
    if not from_weights or reads_none or passes_on(node):
        return None
    rule = factoring(node) if packet in _PRODUCTS else None
    added = rule.additive if rule else frozenset()
    for i, each in enumerate(given):
        if each.stored and i not in added:
            others = [j for j in from_weights if j != i and j not in added]
            if packet not in _PRODUCTS or others:
                return f"the gradients of {', '.join(sorted(used))} are computed from {', '.join(sorted(each.stored))}"
    return None
