"""Decide for each layer what its backward computes again in the place of keeping it.

Needs: stages. Writes the plans of units; for `selective` it also marks calls in the bodies, which are then not run again.
Legality: what runs again runs on the same inputs and draws the same random numbers, so it gives the same values.

full: every layer runs again. every:N: the first of each N layers. selective: every layer, but no product (an operator that
contracts) and no attention into which a gradient flows, and no reduction of a partial result. Their results are kept where
something that runs again, or a backward, reads them. The others leave nothing behind: a product whose sum over ranks is kept
in its place, or one whose result is only added to what the layer gives. Only layers are computed again: what comes before them
is cheap, and the backward of what comes behind them follows at once.

    q = linear(h, wq)                                  q = keep(linear, h, wq)
    o = linear(a, wo); r = allreduce_identity(o)       o = once(linear, a, wo); r = keep(allreduce_identity, o)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from shardcomp.cost.flops import of_node
from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.program import (
    INPUT,
    KEEP,
    LAYER,
    MARK,
    ONCE,
    Body,
    Context,
    Contract,
    Program,
    Unit,
    tensor_arguments,
    value,
    values,
)
from shardcomp.kernels.dropout import dropout
from shardcomp.sharding.rules import factoring

CONTRACT = Contract(requires=frozenset({"layouts", "stages"}), provides=frozenset({"recompute"}))

aten = torch.ops.aten
_LINEAR = {aten.to, aten._to_copy, dropout}
"""Operators that are linear in their operand for a backward, though no rule says so: none of them saves it."""


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
    """By the id of each unit that the option has run again: full or selective."""
    if asked == "none":
        return {}
    kind, _, number = asked.partition(":")
    layers = [unit for unit in program.units if unit.kind == LAYER]
    return {id(unit): "full" if number else kind for unit in layers[:: int(number or 1)] if _differentiable(unit)}


def _differentiable(unit: Unit) -> bool:
    """Whether a gradient flows into the unit: its backward then comes after that of others, and what it saves waits."""
    return any(value(node).requires_grad for node in unit.body.placeholders(INPUT))


def _marked(body: Body) -> Body:
    """A copy whose calls that are not run again are marked."""
    body = body.copy()
    calls = list(body.calls())
    dear = {node for node in calls if is_dear(node)}
    needed: set[fx.Node] = set()
    for node in reversed(calls):
        if any(_reads(user, dear, needed) for user in node.users):
            needed.add(node)
    for node in dear:
        node.meta[MARK] = KEEP if node in needed else ONCE
    return body


def is_dear(node: fx.Node) -> bool:
    """Whether a call is not to be run again."""
    if not any(held.requires_grad for held in values(node)) or len(values(node)) > 1:
        return False
    if node.target in EXCHANGES:
        operand = value(tensor_arguments(node)[0])
        return EXCHANGES[node.target].forward is not None and bool(operand.layout.partial_axes())
    return bool(of_node(node).forward.products)


def _reads(user: fx.Node, dear: set[fx.Node], needed: set[fx.Node]) -> bool:
    """Whether a value that `user` takes must be there when the unit is computed again."""
    if user.op == "output":
        return False
    if user in dear:
        return user.target not in EXCHANGES  # the backward of a product or of attention needs its operands
    return not passes_on(user) or user in needed


def passes_on(node: fx.Node) -> bool:
    """Whether the backward of a call needs none of its operands."""
    if node.target in EXCHANGES or getattr(node.target, "overloadpacket", node.target) in _LINEAR:
        return True
    rule = factoring(node)
    return rule is not None and (rule.jointly_linear or (len(rule.operands) == 1 and 0 in rule.linear))
