"""Partition the model into units, and let units that are alike share one body.

A node belongs to the unit whose module it comes from, as the policy's [units] say. Nodes outside of every unit join a
neighbour. What no layer feeds joins the unit of its only consumer, or else the first unit. What comes after the layers joins
the last.

Legality: partitioning a graph along its data flow changes nothing. Units are alike when their graphs, constants, shapes,
dtypes, `requires_grad` and policy entries are equal; then one body computes what each of them computes.

    embed -> norm -> linear -> … -> norm -> head        embed | Layer(h, cos, sin) × L | Head(h, labels)
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardcomp.errors import PolicyError
from shardcomp.ir.nodes import ancestors, path_of, role_of, structural_arguments, tensor_arguments, value
from shardcomp.ir.printer import made_by
from shardcomp.ir.program import BUFFER, INPUT, PARAMETER, Body, Context, Contract, Degraded, Program, Unit, Value, module_paths
from shardcomp.kernels.cross_entropy import cross_entropy

CONTRACT = Contract(requires=frozenset({"canonical", "parts"}), provides=frozenset({"units"}))


def run(program: Program, context: Context) -> Program:
    [model] = program.units
    calls = list(model.body.calls())
    kinds = context.policy.unit_kinds(module_paths(program))
    order, unit_index = _assign(calls, kinds, model.body)
    entries = context.policy.weight_entries(program.parameters, program.canonical_names())
    every = [
        _UnitDraft(path, kinds.get(path, "first"), [n for n in calls if unit_index[n] == i]) for i, path in enumerate(order)
    ]
    # The `first` that `_assign` adds may have got no calls.
    drafts = [draft for draft in every if draft.nodes]
    idle = _idle(program, model.body)
    # Before the boundaries, which count a unit's unused parameters among its inputs.
    _keep_idle(idle, drafts, kinds)
    values = dict(program.values)
    bodies: dict[Hashable, Body] = {}
    units = []
    names = _value_names(drafts, model, program)
    for draft in drafts:
        inputs, outputs = _boundary(draft, model.body)
        # All layers of a model usually have one key: later passes then rewrite one body, whatever the depth.
        body_key = draft.key(program, entries, inputs, outputs)
        if body_key not in bodies:
            bodies[body_key] = _body(_class_name(draft, bodies), draft, inputs, outputs)
        for node in outputs:
            values[names[node]] = node.meta["value"]
        units.append(
            Unit(
                draft.path,
                draft.kind,
                bodies[body_key],
                tuple(names[n] for n in inputs if n.op != "placeholder" or role_of(n) == INPUT),
                tuple(names[n] for n in outputs),
                tuple(program.resolve(path_of(n)) for n in inputs if _role(n) == PARAMETER),
                tuple(path_of(n) for n in inputs if _role(n) == BUFFER),
            )
        )
    results = {key: names[node] for key, node in zip(program.outputs, model.body.results, strict=True)}
    unused = [program.resolve(path_of(node)) for node in idle]
    return replace(
        program,
        units=units,
        outputs=results,
        values=values,
        parameters={name: replace(p, idle=name in unused) for name, p in program.parameters.items()},
        tokens=_tokens(model.body),
        degraded=program.degraded + _noted(unused),
    )


def _idle(program: Program, body: Body) -> list[fx.Node]:
    """The parameters that the call does not use, a tied one by its first name."""
    used = {program.resolve(path_of(node)) for node in body.placeholders(PARAMETER) if node.users}
    # Each tied weight once, by the placeholder of its first name.
    first: dict[str, fx.Node] = {}
    for node in body.placeholders(PARAMETER):
        first.setdefault(program.resolve(path_of(node)), node)
    return [node for name, node in first.items() if name not in used]


def _keep_idle(idle: list[fx.Node], drafts: list[_UnitDraft], kinds: dict[str, str]) -> None:
    """Give each unused parameter to the unit whose module owns it, else to the first unit."""
    by_path = {draft.path: draft for draft in drafts}
    for node in idle:
        by_path.get(_claim(path_of(node), kinds) or "", drafts[0]).idle.append(node)


def _noted(unused: list[str]) -> list[Degraded]:
    some = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
    return [Degraded(f"not used by this call: {some}", "held and saved, without a gradient")] if unused else []


def _tokens(body: Body) -> Unit | None:
    """Counts the labels that the loss is a mean over: the part of the graph that makes the labels, so that their number is
    known before the forward."""
    losses = [node for node in body.calls() if node.target is cross_entropy]
    if not losses:
        return None
    labels, ignored = losses[0].args[1:3]
    assert isinstance(labels, fx.Node)
    # The model may shift the labels itself. Then those that are shifted out must not count.
    needed = ancestors([labels])
    draft = _UnitDraft("", "tokens", [node for node in body.calls() if node in needed])
    inputs = [node for node in body.graph.nodes if node.op == "placeholder" and node in needed]
    counting = _body("Tokens", draft, inputs, [labels])
    [counted] = counting.results
    with counting.graph.inserting_before(counting.output):
        differs = counting.graph.call_function(torch.ops.aten.ne.Scalar, (counted, ignored))
        differs.meta = {"path": "", "value": Value(value(counted).shape, torch.bool)}
        total = counting.graph.call_function(torch.ops.aten.sum.default, (differs,))
        total.meta = {"path": "", "value": Value((), torch.int64)}
    counting.output.args = ((total,),)
    return Unit("", "tokens", counting, tuple(path_of(n) for n in inputs), ("tokens",))


class _UnitDraft:
    """The nodes of one unit in the flat graph."""

    def __init__(self, path: str, kind: str, nodes: list[fx.Node]) -> None:
        self.path, self.kind, self.nodes = path, kind, nodes
        self.idle: list[fx.Node] = []

    def key(self, program: Program, entries: dict[str, str], inputs: list[fx.Node], outputs: list[fx.Node]) -> Hashable:
        """Equal for units that are alike: the graph with its nodes numbered."""
        number: dict[fx.Node, int] = {}
        lines: list[Any] = []
        for node in inputs:
            number[node] = len(number)
            role = _role(node)
            lines.append((role, node.meta["value"]))
            if role == PARAMETER:
                parameter = program.parameters[program.resolve(path_of(node))]
                # A tied weight is one certain weight: only units that use that same one are alike.
                tied = parameter.aliases and parameter.name
                lines.append((relative(path_of(node), _naming_root(self)), entries.get(parameter.name), tied))
            elif role == BUFFER:
                # Not its numbers: each unit is given its own buffer.
                buffer = program.buffers[path_of(node)].value
                lines.append((relative(path_of(node), _naming_root(self)), tuple(buffer.shape), buffer.dtype))
        for node in self.nodes:
            number[node] = len(number)
            lines.append((node.target, structural_arguments(node, number), repr(node.meta["value"])))
        return (self.kind, tuple(lines), tuple(number[n] for n in outputs))


def relative(name: str, path: str) -> str:
    """A name below a unit's module; the full name where the module is elsewhere."""
    return name[len(path) + 1 :] if path and name.startswith(path + ".") else name


def _naming_root(draft: _UnitDraft) -> str:
    """What the names in a unit's code are relative to: only layers have alike ones, whose code must not name one of them."""
    return draft.path if draft.kind == "layer" else ""


def _role(node: fx.Node) -> str:
    return role_of(node) or INPUT


def _assign(calls: list[fx.Node], kinds: dict[str, str], body: Body) -> tuple[list[str], dict[fx.Node, int]]:
    """The units' paths in order of execution, and the index of each node's unit."""
    claimed = {node: path for node in calls if (path := _claim(path_of(node), kinds)) is not None}
    order = list(dict.fromkeys(claimed.values()))
    first = next((i for i, path in enumerate(order) if kinds[path] == "first"), None)
    # What comes before the layers needs a unit, even where the policy names none for it.
    if first is None:
        order.insert(0, "first")
        first = 0
    last = len(order) - 1
    unit_index = {node: order.index(path) for node, path in claimed.items()}
    # For each call, the last unit that it gets values from; -1 where it reads placeholders alone.
    fed: dict[fx.Node, int] = {}
    for node in calls:
        feeds = [unit_index[a] if a in unit_index else fed[a] for a in tensor_arguments(node) if a in unit_index or a in fed]
        fed[node] = max(feeds, default=-1)
    # What no unit claims, backward: its readers have a unit already. It joins the first of them to run, unless nothing of a
    # layer feeds it and it would join a layer: then all layers share it, as rotary tables are shared.
    for node in reversed(calls):
        if node in unit_index:
            continue
        users = [unit_index[user] for user in node.users if user in unit_index]
        target = min(users, default=last)
        if fed[node] <= first and _kind(order, kinds, target) == "layer":
            target = first
        unit_index[node] = target
    for node in calls:
        # An unclaimed call joined its first reader and so runs early enough. A module that runs again after another unit has
        # read its result cannot be one unit.
        for read in tensor_arguments(node):
            if unit_index.get(read, -1) > unit_index[node]:
                violation = f"{order[unit_index[node]]} reads what {order[unit_index[read]]} gives, which runs after it"
                raise PolicyError(f"[units]: {violation}: a unit runs once; name a module that holds both")
    return order, unit_index


def _kind(order: list[str], kinds: dict[str, str], index: int) -> str:
    return kinds.get(order[index], "first")


def _claim(path: str, kinds: dict[str, str]) -> str | None:
    """The unit whose module holds `path`."""
    while path:
        if path in kinds:
            return path
        path = path.rpartition(".")[0]
    return None


def _boundary(draft: _UnitDraft, body: Body) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a unit reads from outside, in the order it is read, inputs before parameters before buffers; and what it gives."""
    own = set(draft.nodes)
    read = list(dict.fromkeys(a for node in draft.nodes for a in tensor_arguments(node) if a not in own)) + draft.idle
    ranks = {INPUT: 0, PARAMETER: 1, BUFFER: 2}
    # The sort is stable. Within a role, values stay in the order of first use, which is the same in alike units.
    read.sort(key=lambda n: ranks[_role(n)])
    # The graph's output counts as a user from outside.
    results = [node for node in draft.nodes if any(user not in own for user in node.users)]
    return read, results


def _value_names(drafts: list[_UnitDraft], model: Unit, program: Program) -> dict[fx.Node, str]:
    """A short unique name for every value that crosses a boundary: an input's own, the caller's for a result, else its
    module's."""
    # Values that cross a boundary have one name in the whole program, so that units can be wired by names.
    names = {n: path_of(n) for n in model.body.placeholders(INPUT)}
    results = {node: key for key, node in zip(program.outputs, model.body.results, strict=True)}
    taken = set(names.values())
    for draft in drafts:
        outputs = _boundary(draft, model.body)[1]
        bases = [results.get(node) or _base_name(node, draft) for node in outputs]
        for node, base in zip(outputs, bases, strict=True):
            if base != "hidden" and bases.count(base) > 1:  # a module with several results, such as cos and sin
                base = made_by(node)
            name, count = base, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
            names[node] = name
            taken.add(name)
    for node in model.body.results:
        names.setdefault(node, node.name)
    return names


def _base_name(node: fx.Node, draft: _UnitDraft) -> str:
    module = path_of(node).rpartition(".")[2]
    if node.meta["value"].requires_grad or module.isdigit():  # a layer, which may be frozen
        return "hidden"
    return module or node.name


def _class_name(draft: _UnitDraft, bodies: dict[Hashable, Body]) -> str:
    base = {"first": "First", "layer": "Layer", "last": "Last"}[draft.kind]
    taken = {body.name for body in bodies.values()}
    count = 2
    name = base
    while name in taken:
        name, count = f"{base}{count}", count + 1
    return name


def _body(name: str, draft: _UnitDraft, inputs: list[fx.Node], outputs: list[fx.Node]) -> Body:
    """The unit's own graph. Parameter placeholders are named relative to the unit, so that alike units can share it."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        role = _role(node)
        copy = graph.placeholder(node.name)
        path = path_of(node) if role == INPUT else relative(path_of(node), _naming_root(draft))
        copy.meta = {"role": role, "path": path, "value": node.meta["value"]}
        copies[node] = copy
    for node in draft.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.meta = dict(node.meta)
        copy.meta["path"] = relative(path_of(node), draft.path) if path_of(node) != draft.path else ""
        # `relative` left the path as it is: the call comes from a module outside of the unit.
        copy.meta["elsewhere"] = path_of(copy) == path_of(node) != ""
        copies[node] = copy
    graph.output(tuple(copies[n] for n in outputs))
    return Body(name, graph)
