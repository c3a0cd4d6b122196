"""Cut the model into units, and let alike units share one body.

Needs: a canonical Program of one unit. A node belongs to the unit whose module it comes from, as the policy's [units] say.
What is left over joins its neighbour: what no layer feeds joins its only consumer's unit, or else the first unit; what comes
after the layers joins the last.

Legality: cutting a graph along data flow changes nothing. Units are alike when their graphs, constants, shapes, dtypes,
`requires_grad` and policy entries are equal; then one body computes what each of them computes.

    embed -> norm -> linear -> … -> norm -> head        embed | Layer(h, cos, sin) × L | Head(h, labels)
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardcomp.errors import PolicyError
from shardcomp.ir.program import (
    BUFFER,
    INPUT,
    PARAMETER,
    Body,
    Context,
    Contract,
    Degraded,
    Program,
    Unit,
    Value,
    module_paths,
    tensor_arguments,
    value,
)
from shardcomp.kernels.cross_entropy import cross_entropy

CONTRACT = Contract(requires=frozenset({"canonical", "parts"}), provides=frozenset({"units"}))


def run(program: Program, context: Context) -> Program:
    [whole] = program.units
    calls = list(whole.body.calls())
    kinds = context.policy.unit_kinds(module_paths(program))
    order, home = _assign(calls, kinds, whole.body)
    entries = context.policy.weight_entries(program.parameters, program.canonical_names())
    every = [_Piece(path, kinds.get(path, "first"), [n for n in calls if home[n] == i]) for i, path in enumerate(order)]
    pieces = [piece for piece in every if piece.nodes]
    idle = _idle(program, whole.body)
    _give_homes(idle, pieces, kinds)
    values = dict(program.values)
    bodies: dict[Hashable, Body] = {}
    units = []
    names = _value_names(pieces, whole, program)
    for piece in pieces:
        inputs, outputs = _borders(piece, whole.body)
        body_key = piece.key(program, entries, inputs, outputs)
        if body_key not in bodies:
            bodies[body_key] = _body(_class_name(piece, bodies), piece, inputs, outputs)
        for node in outputs:
            values[names[node]] = node.meta["value"]
        units.append(
            Unit(
                piece.path,
                piece.kind,
                bodies[body_key],
                tuple(names[n] for n in inputs if n.op != "placeholder" or n.meta["role"] == INPUT),
                tuple(names[n] for n in outputs),
                tuple(program.resolve(n.meta["path"]) for n in inputs if _role(n) == PARAMETER),
                tuple(n.meta["path"] for n in inputs if _role(n) == BUFFER),
            )
        )
    results = {key: names[node] for key, node in zip(program.outputs, whole.body.results, strict=True)}
    unused = [program.resolve(node.meta["path"]) for node in idle]
    return replace(
        program,
        units=units,
        outputs=results,
        values=values,
        parameters={name: replace(p, idle=name in unused) for name, p in program.parameters.items()},
        tokens=_tokens(whole.body),
        degraded=program.degraded + _noted(unused),
    )


def _idle(program: Program, body: Body) -> list[fx.Node]:
    """The parameters that the call does not use, a tied one by its first name."""
    used = {program.resolve(node.meta["path"]) for node in body.placeholders(PARAMETER) if node.users}
    first: dict[str, fx.Node] = {}
    for node in body.placeholders(PARAMETER):
        first.setdefault(program.resolve(node.meta["path"]), node)
    return [node for name, node in first.items() if name not in used]


def _give_homes(idle: list[fx.Node], pieces: list[_Piece], kinds: dict[str, str]) -> None:
    """Let the unit whose module has it hold a parameter that no call uses, and the first unit what is in no unit's module."""
    by_path = {piece.path: piece for piece in pieces}
    for node in idle:
        by_path.get(_claim(node.meta["path"], kinds) or "", pieces[0]).idle.append(node)


def _noted(unused: list[str]) -> list[Degraded]:
    some = ", ".join(unused[:4]) + (f" and {len(unused) - 4} more" if len(unused) > 4 else "")
    return [Degraded(f"not used by this call: {some}", "held and saved, without a gradient")] if unused else []


def _tokens(body: Body) -> Unit | None:
    """The labels that count, cut out of the graph in front of the cross entropy: how many there are is known before the
    forward."""
    losses = [node for node in body.calls() if node.target is cross_entropy]
    if not losses:
        return None
    labels, ignored = losses[0].args[1:3]
    assert isinstance(labels, fx.Node)
    needed: set[fx.Node] = set()
    pending = [labels]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += tensor_arguments(node)
    piece = _Piece("", "tokens", [node for node in body.calls() if node in needed])
    inputs = [node for node in body.graph.nodes if node.op == "placeholder" and node in needed]
    counting = _body("Tokens", piece, inputs, [labels])
    [counted] = counting.results
    with counting.graph.inserting_before(counting.output):
        differs = counting.graph.call_function(torch.ops.aten.ne.Scalar, (counted, ignored))
        differs.meta = {"path": "", "value": Value(value(counted).shape, torch.bool)}
        total = counting.graph.call_function(torch.ops.aten.sum.default, (differs,))
        total.meta = {"path": "", "value": Value((), torch.int64)}
    counting.output.args = ((total,),)
    return Unit("", "tokens", counting, tuple(n.meta["path"] for n in inputs), ("tokens",))


class _Piece:
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
                parameter = program.parameters[program.resolve(node.meta["path"])]
                tied = parameter.aliases and parameter.name
                lines.append((relative(node.meta["path"], _home_path(self)), entries.get(parameter.name), tied))
            elif role == BUFFER:
                held = program.buffers[node.meta["path"]].value
                lines.append((relative(node.meta["path"], _home_path(self)), tuple(held.shape), held.dtype))
        for node in self.nodes:
            number[node] = len(number)
            arguments = fx.map_arg((node.args, node.kwargs), lambda a: _Number(number[a]))
            lines.append((node.target, repr(arguments), repr(node.meta["value"])))
        return (self.kind, tuple(lines), tuple(number[n] for n in outputs))


class _Number:
    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"%{self.index}"


def relative(name: str, path: str) -> str:
    """A name below a unit's module; the whole name where it lies elsewhere."""
    return name[len(path) + 1 :] if path and name.startswith(path + ".") else name


def _home_path(piece: _Piece) -> str:
    """What the names in a unit's code are relative to: only layers have alike ones, whose code must not name one of them."""
    return piece.path if piece.kind == "layer" else ""


def _role(node: fx.Node) -> str:
    return node.meta["role"] if node.op == "placeholder" else INPUT


def _assign(calls: list[fx.Node], kinds: dict[str, str], body: Body) -> tuple[list[str], dict[fx.Node, int]]:
    """The units' paths in order of execution, and the index of each node's unit."""
    claimed = {node: path for node in calls if (path := _claim(node.meta["path"], kinds)) is not None}
    order = list(dict.fromkeys(claimed.values()))
    first = next((i for i, path in enumerate(order) if kinds[path] == "first"), None)
    if first is None:
        order.insert(0, "first")
        first = 0
    last = len(order) - 1
    home = {node: order.index(path) for node, path in claimed.items()}
    fed: dict[fx.Node, int] = {}
    for node in calls:
        feeds = [home[a] if a in home else fed[a] for a in tensor_arguments(node) if a in home or a in fed]
        fed[node] = max(feeds, default=-1)
    for node in reversed(calls):
        if node in home:
            continue
        users = [home[user] for user in node.users if user in home]
        target = min(users, default=last)
        if fed[node] <= first and _kind(order, kinds, target) == "layer":
            target = first
        home[node] = target
    for node in calls:
        for read in tensor_arguments(node):
            if home.get(read, -1) > home[node]:
                fault = f"{order[home[node]]} reads what {order[home[read]]} gives, which runs behind it"
                raise PolicyError(f"[units]: {fault}: a unit runs once; name a module that holds both")
    return order, home


def _kind(order: list[str], kinds: dict[str, str], index: int) -> str:
    return kinds.get(order[index], "first")


def _claim(path: str, kinds: dict[str, str]) -> str | None:
    """The unit whose module holds `path`."""
    while path:
        if path in kinds:
            return path
        path = path.rpartition(".")[0]
    return None


def _borders(piece: _Piece, body: Body) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a unit reads from outside, in the order it is read, inputs before parameters before buffers; and what it gives."""
    own = set(piece.nodes)
    read = list(dict.fromkeys(a for node in piece.nodes for a in tensor_arguments(node) if a not in own)) + piece.idle
    ranks = {INPUT: 0, PARAMETER: 1, BUFFER: 2}
    read.sort(key=lambda n: ranks[_role(n)])
    given = [node for node in piece.nodes if any(user not in own for user in node.users)]
    return read, given


def _value_names(pieces: list[_Piece], whole: Unit, program: Program) -> dict[fx.Node, str]:
    """A short unique name for every value that crosses a border: an input's own, the caller's for a result, else its
    module's."""
    names = {n: n.meta["path"] for n in whole.body.placeholders(INPUT)}
    results = {node: key for key, node in zip(program.outputs, whole.body.results, strict=True)}
    taken = set(names.values())
    for piece in pieces:
        for node in _borders(piece, whole.body)[1]:
            base = results.get(node) or _base_name(node, piece)
            name, count = base, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
            names[node] = name
            taken.add(name)
    for node in whole.body.results:
        names.setdefault(node, node.name)
    return names


def _base_name(node: fx.Node, piece: _Piece) -> str:
    module = node.meta["path"].rpartition(".")[2]
    if node.meta["value"].requires_grad or module.isdigit():  # a layer, which may be frozen
        return "hidden"
    return module or node.name


def _class_name(piece: _Piece, bodies: dict[Hashable, Body]) -> str:
    base = {"first": "First", "layer": "Layer", "last": "Last"}[piece.kind]
    taken = {body.name for body in bodies.values()}
    count = 2
    name = base
    while name in taken:
        name, count = f"{base}{count}", count + 1
    return name


def _body(name: str, piece: _Piece, inputs: list[fx.Node], outputs: list[fx.Node]) -> Body:
    """The unit's own graph. Parameter placeholders are named relative to the unit, so that alike units can share it."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        role = _role(node)
        copy = graph.placeholder(node.name)
        path = node.meta.get("path", "") if role == INPUT else relative(node.meta["path"], _home_path(piece))
        copy.meta = {"role": role, "path": path, "value": node.meta["value"]}
        copies[node] = copy
    for node in piece.nodes:
        copy = graph.node_copy(node, lambda n: copies[n])
        copy.meta = dict(node.meta)
        copy.meta["path"] = relative(node.meta["path"], piece.path) if node.meta["path"] != piece.path else ""
        copy.meta["elsewhere"] = copy.meta["path"] == node.meta["path"] != ""
        copies[node] = copy
    graph.output(tuple(copies[n] for n in outputs))
    return Body(name, graph)
