"""Which stages can compute the gradients of their inputs and of their weights at different times.

The first half of a split backward computes the gradients of what the stage received, and the second half the gradients of the
weights. The second half starts at the operators where a weight first meets a received value, and runs back to the weight. Two
things prevent a split:

- A weight is used again after its own result. Then the second half would pass through operators of the first half, which has
  freed their saved values.
- The parameters are resharded between the halves, and the second half needs one. A product of a weight and a received value
  needs only the received value for the weight's gradient. `w * w` needs `w`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from shardcomp.ir.nodes import requires_grad, tensor_arguments
from shardcomp.ir.operators import facts_of
from shardcomp.ir.program import INPUT, PARAMETER, Program, Unit
from shardcomp.kernels.linear_cross_entropy import is_early
from shardcomp.sharding.rules import factoring, passes_on


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from.

    received: whether a gradient flows from it to the stage before. weights: the trained parameters that it depends on.
    stored: the parameters that are resharded after forward and in whose memory it may lie; one-dimensional ones are left out,
    since code computes with copies of them (see `UnitParameters`).
    """

    received: bool = False
    weights: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()


def reason_not_split(program: Program, stage: int, reshard: bool) -> str | None:
    """Why the backward of a stage cannot be split, None where it can. A stage whose inputs need no gradient is not split.
    reshard: whether parameters are resharded between the forward and the backward."""
    origins = {name: _Origin(received=True) for name in program.received(stage) if program.values[name].requires_grad}
    if not origins:
        return None
    for unit in program.in_stages((stage,)):
        violation = _walk(program, unit, origins, reshard)
        if violation is not None:
            return f"{unit.path}: {violation}"
    return None


def _walk(program: Program, unit: Unit, origins: dict[str, _Origin], reshard: bool) -> str | None:
    """Go through a unit, and note where its results come from."""
    known: dict[fx.Node, _Origin] = {}
    for node, name in zip(unit.body.placeholders(INPUT), unit.inputs, strict=True):
        known[node] = origins.get(name, _Origin())
    for node, name in zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True):
        parameter = program.parameters[name]
        own, none = frozenset({name}), frozenset[str]()
        stored = own if reshard and len(parameter.shape) > 1 else none
        # A frozen parameter has no gradient to compute, but its memory may still be freed.
        known[node] = _Origin(weights=own if parameter.requires_grad else none, stored=stored)
    for node in unit.body.calls():
        operands = tensor_arguments(node)
        violation = _violation(node, operands, known)
        if violation is not None:
            return violation
        known[node] = _result(node, operands, known)
    origins.update({name: known[node] for name, node in zip(unit.outputs, unit.body.results, strict=True) if node in known})
    return None


def _result(node: fx.Node, operands: list[fx.Node], known: Mapping[fx.Node, _Origin]) -> _Origin:
    read = [known[origin] for origin in operands if origin in known]
    # A view of a parameter lies in the parameter's memory.
    lies_there = len(operands) == 1 and read and (facts_of(node).family == "split" or passes_on(node))
    stored = read[0].stored if lies_there else frozenset[str]()
    if not requires_grad(node):
        return _Origin(stored=stored)
    return _Origin(
        any(origin.received for origin in read), frozenset[str]().union(*(origin.weights for origin in read)), stored
    )


def _violation(node: fx.Node, operands: list[fx.Node], known: Mapping[fx.Node, _Origin]) -> str | None:
    """What a call does that a split backward cannot."""
    read = [known.get(origin, _Origin()) for origin in operands]
    # Where such an operand meets a received one, the second half of the backward begins.
    from_weights = [i for i, origin in enumerate(read) if origin.weights and not origin.received]
    used = frozenset[str]().union(*(read[i].weights for i in from_weights))
    # x w, and later y w where y comes from x w: the way back to the first w leads through the second.
    again = used & frozenset[str]().union(*(origin.weights for origin in read if origin.received))
    if again:
        return f"{min(again)} is used again after its own result"
    row = facts_of(node)
    early = "makes_logits" in row.facts and is_early(node)  # its forward computes the gradients
    reads_none = row.backward == "indices" or row.family == "split" or early
    if not from_weights or reads_none or passes_on(node):
        return None
    reads_others = row.backward == "others"
    rule = factoring(node) if reads_others else None
    added = rule.additive if rule else frozenset()
    for i, origin in enumerate(read):
        if origin.stored and i not in added:
            # The gradient of w in x w reads x alone. The gradient of v in v w reads w, which may be resharded by then.
            others = [j for j in from_weights if j != i and j not in added]
            if not reads_others or others:
                return f"the gradients of {', '.join(sorted(used))} are computed from {', '.join(sorted(origin.stored))}"
    return None
