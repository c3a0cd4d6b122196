"""Decide what the backward of each layer recomputes, and what it keeps: activation checkpointing.

The pass writes the plans of units. For `selective` it also marks the calls in a body that are not run again.

- `full`: every layer runs again.
- `every:N`: the first of each N layers runs again.
- `selective`: every layer runs again, without its expensive calls. These are products (operators that contract), attention
  into which a gradient flows, and reductions of partial results.

The result of an expensive call is kept where a recomputed call, or a backward, reads it. Otherwise it is dropped. Two examples
are a product whose sum over ranks is kept instead, and a product that is only added to the layer's result. Only layers are
recomputed: what comes before them is cheap, and the backward of what comes after them follows their forward at once.

Legality: a call that runs again has the same inputs and draws the same random numbers, so it gives the same values.

    q = linear(h, wq)                                  q = keep(linear, h, wq)
    o = linear(a, wo); r = allreduce_identity(o)       o = drop(linear, a, wo); r = keep(allreduce_identity, o)
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from shardcomp.cost.flops import of_node
from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.nodes import requires_grad, tensor_arguments, value, values
from shardcomp.ir.program import DROP, INPUT, KEEP, LAYER, MARK, Body, Context, Contract, Program, Unit
from shardcomp.sharding.rules import passes_on

CONTRACT = Contract(requires=frozenset({"layouts", "stages"}), provides=frozenset({"recompute"}))


def run(program: Program, context: Context) -> Program:
    chosen = kinds(program, context.policy.options.recompute)
    if not chosen:
        return program
    marked: dict[int, Body] = {}
    units = []
    for unit in program.units:
        if id(unit) in chosen:
            kind = chosen[id(unit)]
            unit = replace(unit, plan=replace(unit.plan, recompute=kind))
            if kind == "selective":
                if id(unit.body) not in marked:
                    marked[id(unit.body)] = _marked(unit.body)
                unit = replace(unit, body=marked[id(unit.body)])
        units.append(unit)
    return replace(program, units=units)


def kinds(program: Program, asked: str) -> dict[int, str]:
    """By the id of each unit that the option recomputes: full or selective."""
    if asked == "none":
        return {}
    kind, _, number = asked.partition(":")
    layers = [unit for unit in program.units if unit.kind == LAYER]
    # every:2 takes layers 0, 2, 4, …
    return {id(unit): "full" if number else kind for unit in layers[:: int(number or 1)] if _differentiable(unit)}


def _differentiable(unit: Unit) -> bool:
    """Whether a gradient flows into the unit: its backward then comes after other backwards, and what it saves waits."""
    return any(value(node).requires_grad for node in unit.body.placeholders(INPUT))


def _marked(body: Body) -> Body:
    """A copy whose calls that are not run again are marked."""
    body = body.copy()
    calls = list(body.calls())
    dear = {node for node in calls if is_dear(node)}
    # Backward, since whether a result is needed depends on what its readers need.
    needed: set[fx.Node] = set()
    for node in reversed(calls):
        if any(_reads(user, dear, needed) for user in node.users):
            needed.add(node)
    for node in dear:
        node.meta[MARK] = KEEP if node in needed else DROP
    return body


def is_dear(node: fx.Node) -> bool:
    """Whether a call is not to be run again."""
    if not requires_grad(node) or len(values(node)) > 1:
        return False
    if node.target in EXCHANGES:
        # To repeat a reduction of partial results would be to send its message again.
        operand = value(tensor_arguments(node)[0])
        return EXCHANGES[node.target].forward is not None and bool(operand.layout.partial_axes())
    return bool(of_node(node).forward.products)


def _reads(user: fx.Node, dear: set[fx.Node], needed: set[fx.Node]) -> bool:
    """Whether a value that `user` takes must be there when the unit is recomputed."""
    if user.op == "output":
        return False
    if user in dear:
        return user.target not in EXCHANGES  # the backward of a product or of attention needs its operands
    # A call whose backward reads no operand is repeated only where its own result is needed.
    return not passes_on(user) or user in needed
