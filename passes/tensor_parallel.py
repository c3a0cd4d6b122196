"""Tensor and sequence parallelism: give weights and borders a layout, propagate, and insert the collectives that follow.

Needs: units. The policy says how each weight is cut; `propagate` chooses a cut for every call. Wherever a value does not lie
as a call needs it, a collective is inserted, once per value and target; wherever a whole value's gradient would come out as
one rank's summand, a reduction is inserted in the backward direction (the law of gradients).

Legality: each collective's forward and backward are adjoint, so a call on cut operands gives a cut of what it gave on whole
ones, and each gradient is whole, cut like its value, or recorded as partial on its parameter. At a unit's border a value is
whole or cut, never partial, and its gradient lies as it does; so units are legal by themselves, and each body is rewritten
once for each layout that its inputs come in.

    h = norm(x); q = linear(h, Wq)         h = norm(x); g = allgather_reducescatter(h); q = linear(g, Wq local)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from shardcomp.errors import InternalError, PlanError, PolicyError, raise_all
from shardcomp.ir.layout import WHOLE, Layout, Placement, split
from shardcomp.ir.program import (
    INPUT,
    PARAMETER,
    Body,
    Context,
    Contract,
    Degraded,
    Program,
    S,
    Unit,
    Value,
    stored,
    tensor_arguments,
    value,
    values,
)
from shardcomp.kernels.dropout import stream_for
from shardcomp.kernels.embedding import scales_by_frequency
from shardcomp.sharding.propagation import AxisSplit, Propagation, boundary_placement, propagate, refine
from shardcomp.sharding.reshard import reshard_steps
from shardcomp.sharding.rules import factoring, unfuse
from shardcomp.sharding.weight_dims import UNEVEN, key_value_weights, module_of, weight_layouts

CONTRACT = Contract(requires=frozenset({"canonical", "units"}), provides=frozenset({"layouts"}))
AXIS = "tp"
COPIES = "tp_rep"
"""The part of the axis along which the same piece is held."""


def run(program: Program, context: Context) -> Program:
    size = context.mesh.size(AXIS)
    layouts, uncut = weight_layouts(program, context.policy, AXIS, size)
    raise_all(PlanError, f"{program.name} with {context.policy.source}", _partly_counted(program, context, layouts))
    shared = {name for unit in program.units for name in unit.parameters if _owners(program, name) > 1}
    rewrite = _Rewrite(program, context, layouts, shared)
    held = {name: Layout() for name in program.inputs}
    memo: dict[Any, tuple[Body, tuple[Layout, ...]]] = {}
    units = []
    for unit in program.units:
        key = (id(unit.body), tuple(held[name] for name in unit.inputs), _finals(unit, program))
        if key not in memo:
            memo[key] = rewrite.body(unit, [held[name] for name in unit.inputs], len([k for k in memo if k[0] == key[0]]))
        body, results = memo[key]
        held.update(zip(unit.outputs, results, strict=True))
        units.append(replace(unit, body=body))
        rewrite.record_parameters(unit, body)
    violations = rewrite.violations()
    heads = tuple(violations)
    if not violations and not rewrite.stuck:
        uncut = {name: text for name, text in uncut.items() if name not in rewrite.copied}
    rows = [text for name, text in uncut.items() if not any(name.startswith(where + ".") for where in heads)]
    raise_all(PolicyError, f"{context.policy.source} with tensor = {size}", [*violations.values(), *rows])
    if rewrite.stuck:
        raise InternalError(f"tensor: no layout of the operands of {', '.join(rewrite.stuck)}")
    mesh = replace(context.mesh, copies=rewrite.copies())
    parameters = {
        name: replace(p, layout=rewrite.layouts.get(name, Layout()), partial_gradient=rewrite.partial.get(name, ()))
        for name, p in program.parameters.items()
    }
    known = {name: replace(v, layout=held.get(name, v.layout)) for name, v in program.values.items()}
    degraded = list(dict.fromkeys(program.degraded + rewrite.degraded))
    return replace(program, units=units, parameters=parameters, values=known, degraded=degraded, mesh=mesh)


def _partly_counted(program: Program, context: Context, layouts: dict[str, Layout]) -> list[str]:
    """What is wrong with embeddings that divide a row's gradient by how often the whole batch has it: a rank, or a
    micro-batch, that sees a part of it."""
    mesh, micro_batch, violations = context.mesh, context.policy.options.micro_batch, []
    for unit in program.units:
        names = dict(zip(unit.body.placeholders(PARAMETER), unit.parameters, strict=True))
        for node in unit.body.calls():
            if node.target is not torch.ops.aten.embedding.default or not scales_by_frequency(node):
                continue
            if not value(node).requires_grad:
                continue
            weight = stored(node.args[0])
            what = names[weight] if weight is not None else module_of(unit, node)
            start = f"{what}: scale_grad_by_freq = True divides a row's gradient by how often the batch has it, and"
            at = layouts.get(what, Layout()).on(AXIS).dim
            if weight is not None and at is not None and _is_row(node, weight, at):
                violations.append(
                    f'{start} its rows are split over tensor = {mesh.size(AXIS)}: use "whole" for it, or tensor = 1'
                )
            if mesh.dp > 1:
                violations.append(f"{start} each of data = {mesh.dp} ranks counts its own samples: use data = 1")
            if micro_batch is not None:
                violations.append(f"{start} each micro-batch counts its own samples: leave micro_batch = {micro_batch} out")
    return violations


def _is_row(node: fx.Node, weight: fx.Node, dim: int) -> bool:
    """Whether a dimension of the stored weight is the one that an embedding looks up."""
    return dim == (0 if node.args[0] is weight else 1)


def _owners(program: Program, name: str) -> int:
    return sum(name in unit.parameters for unit in program.units)


def _finals(unit: Unit, program: Program) -> tuple[bool, ...]:
    """Which of a unit's results leave the program: those need not lie as a border asks."""
    return tuple(name in program.outputs.values() for name in unit.outputs)


@dataclass
class _Use:
    """A value as one call needs it: its placement, and whether the gradient that comes back is one rank's summand."""

    placement: Placement
    partial_gradient: bool


class _Rewrite:
    """Rewrites bodies for one axis, and gathers what it learns about parameters on the way."""

    def __init__(self, program: Program, context: Context, layouts: dict[str, Layout], shared: set[str]) -> None:
        self.program, self.size = program, context.mesh.size(AXIS)
        length = program.static_shape[1] if program.static_shape else S
        self.cutting = AxisSplit(self.size, length if context.policy.options.sequence_parallel else None)
        self.layouts, self.shared = dict(layouts), shared
        self.words = context.policy.weight_entries(program.parameters, program.canonical_names())
        self.indivisible: dict[str, set[int]] = {}
        self.stuck: list[str] = []
        self.copied: set[str] = set()
        self.degraded: list[Degraded] = []
        self.partial: dict[str, tuple[str, ...]] = {}

    def body(self, unit: Unit, inputs: list[Layout], copies: int) -> tuple[Body, tuple[Layout, ...]]:
        """The unit's body with layouts and collectives for these input layouts, and the layouts of its results."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        results = graph.graph_copy(unit.body.graph, copied)
        for old, new in copied.items():
            new.meta = dict(old.meta)
        graph.output(results)
        body = Body(unit.body.name + (f"{copies + 1}" if copies else ""), graph)
        if self.size == 1:
            return body, tuple(Layout() for _ in body.results)
        given = {node: layout.on(AXIS) for node, layout in zip(body.placeholders(INPUT), inputs, strict=True)}
        heads = {weight: count for _, weight, count in key_value_weights(body)}
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            given[node] = self._initial(node, name, heads.get(node))
        self._separate_additions(body, given)
        done = self._propagate(unit, body, given)
        added: set[fx.Node] = set()
        while _add_partial_first(body, done, added):
            done = self._propagate(unit, body, given)
        for node, placement in given.items():
            node.meta["value"] = _at(value(node), placement)
        self._convert(unit, body, done)
        return body, tuple(value(node).layout for node in body.results)

    def _initial(self, node: fx.Node, name: str, heads: int | None) -> Placement:
        """Where a weight starts: with more ranks than rows or `heads`, or rows that they do not divide, in fewer pieces."""
        placement = self.layouts.get(name, Layout()).on(AXIS)
        if placement.dim is None or self.words.get(name) in UNEVEN:
            return placement
        pieces = math.gcd(int(value(node).shape[placement.dim]), self.size)
        if heads is not None and self.size % heads == 0:
            pieces = heads
        return placement if pieces == 1 != heads else _pieces(placement, pieces, self.size)

    def _propagate(self, unit: Unit, body: Body, given: dict[fx.Node, Placement]) -> Propagation:
        """Propagate; a weight whose cut is lost where there are more ranks than pieces, as with key-value heads, is held in
        copies, and `given` says so afterwards."""
        done = first = propagate(body, self.cutting, given)
        tried = dict(given)
        while done.indivisible:
            before = dict(tried)
            for lost in done.indivisible:
                for weight in lost.origins:
                    if self.size % lost.size == 0:
                        tried[weight] = _pieces(tried[weight], lost.size, self.size)
            if tried == before:
                break
            done = propagate(body, self.cutting, tried)
        if done.indivisible or done.stuck:
            self._report(unit, first)
            self.stuck += [f"{module_of(unit, node)}: {_name(node)}" for node in done.stuck]
            return first
        given.update(tried)
        return refine(body, self.cutting, given, _finals(unit, self.program))

    def _separate_additions(self, body: Body, given: dict[fx.Node, Placement]) -> None:
        """Take the bias out of a product whose weight is cut along what it contracts: it is added once, after the reduction."""
        for node in list(body.calls()):
            product = unfuse(node)
            rule = factoring(node)
            if product is None or rule is None:
                continue
            made = {factor for dims in rule.results for factor in dims}
            placed = [
                (_stored(operand, given), dims) for operand, dims in zip(tensor_arguments(node), rule.operands, strict=True)
            ]
            cut = [dims[at.dim] for at, dims in placed if at.dim is not None]
            if all(factor in made for factor in cut):
                continue
            target, arguments, added = product
            with body.graph.inserting_before(node):
                alone = body.graph.call_function(target, arguments)
                alone.meta = dict(node.meta)
                total = body.graph.call_function(torch.ops.aten.add.Tensor, (alone, added))
                total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            body.graph.erase_node(node)

    def _report(self, unit: Unit, done: Propagation) -> None:
        for lost in done.indivisible:
            self.indivisible.setdefault(module_of(unit, lost.node), set()).add(lost.size)

    def violations(self) -> dict[str, str]:
        """For every module that cannot keep its cut: the sizes that do not divide, and the degrees that would."""
        found = {}
        for where, sizes in self.indivisible.items():
            named = " and ".join(self._named_sizes(size) for size in sorted(sizes, reverse=True))
            legal = ", ".join(str(n) for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes))
            found[where] = f"{where}: {named} cannot be split over tensor = {self.size}: use {legal}"
        return found

    def _named_sizes(self, size: int) -> str:
        """The size with the names of the configuration's keys that hold it, such as a number of heads."""
        settings = self.program.config.to_dict() if hasattr(self.program.config, "to_dict") else {}
        keys = [key for key, held in settings.items() if type(held) is int and held == size and "head" in key]
        return " = ".join([*keys, str(size)]) if keys else f"a dimension of {size}"

    def _convert(self, unit: Unit, body: Body, done: Propagation) -> None:
        """Insert the collectives, set every node's layout, and swap in split forms."""
        cache: dict[tuple[fx.Node, Placement, bool], fx.Node] = {}
        mixed = self._mixed_parameters(unit, body, done)
        for node in list(body.graph.nodes):
            if node.op == "placeholder":
                continue
            if node.op == "output":
                finals = _finals(unit, self.program)
                results = []
                for result, final in zip(body.results, finals, strict=True):
                    target = boundary_placement(value(result), done.placements[result][0], final, self.cutting)
                    results.append(self._bring(body, result, done, _Use(target, False), node, cache, mixed))
                node.args = (tuple(results),)
                continue
            choice = done.choices[node]
            operands = tensor_arguments(node)
            graded = any(v.requires_grad for v in values(node))
            brought = []
            for operand, placement, partial in zip(operands, choice.operands, choice.partial_gradient, strict=True):
                several = not isinstance(operand.meta["value"], Value)
                use = _Use(placement, partial and graded)
                brought.append(operand if several else self._bring(body, operand, done, use, node, cache, mixed))
            self._note_unruled(unit, node, operands, done)
            in_order = iter(brought)
            node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _, order=in_order: next(order))
            _set_layouts(node, choice.results)
            if "random" in node.kwargs:
                node.kwargs = {**node.kwargs, "random": stream_for(node, choice.results[0])}
            if choice.form is not None:
                node.args = (*choice.form.arguments(node), AXIS)
                node.kwargs = {}
                node.meta["form"] = choice.form
                node.target = choice.form.function

    def _mixed_parameters(self, unit: Unit, body: Body, done: Propagation) -> set[fx.Node]:
        """Whole parameters that may not be recorded as having a partial gradient: another use gives them a whole one."""
        found = set()
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            uses = [
                done.choices[user].partial_gradient[i]
                for user in node.users
                if user.op == "call_function" and any(v.requires_grad for v in values(user))
                for i, operand in enumerate(tensor_arguments(user))
                if operand is node and done.choices[user].operands[i].is_whole
            ]
            if name in self.shared or len(set(uses)) > 1:
                found.add(node)
        return found

    def _bring(
        self,
        body: Body,
        operand: fx.Node,
        done: Propagation,
        use: _Use,
        user: fx.Node,
        cache: dict[tuple[fx.Node, Placement, bool], fx.Node],
        mixed: set[fx.Node],
    ) -> fx.Node:
        """`operand` as `use` needs it, through a collective where it lies otherwise; inserted once per value and need."""
        now = done.placements[operand][0]
        held = value(operand)
        partial = use.partial_gradient and held.requires_grad and use.placement.is_whole and operand not in done.passed_back
        if now.is_whole and use.placement.is_whole and partial and _is_parameter(operand) and operand not in mixed:
            operand.meta["partial_gradient"] = (AXIS,)
            return operand
        key = (operand, use.placement, partial)
        if key not in cache:
            made = operand
            for target, arguments, placement in reshard_steps(now, use.placement, partial, held.requires_grad, self.size):
                with body.graph.inserting_before(user):
                    node = body.graph.call_function(target, (made, *arguments, AXIS))
                node.meta = {"path": user.meta.get("path", ""), "value": _at(held, placement)}
                made = node
            cache[key] = made
        return cache[key]

    def _note_unruled(self, unit: Unit, node: fx.Node, operands: list[fx.Node], done: Propagation) -> None:
        """What is right but slower than it could be: an operator without a rule, a weight that is gathered."""
        where = module_of(unit, node) or node.name
        choice = done.choices[node]
        rule = factoring(node)
        for i, (operand, needed) in enumerate(zip(operands, choice.operands, strict=True)):
            now = done.placements[operand][0]
            if now == needed or (now.is_whole and not choice.form) or (now.is_copied and needed.is_whole):
                continue
            if rule is not None and now.dim is not None and rule.operands[i][now.dim] is None and stored(operand) is None:
                what = f"{where}: an operand of {_name(node)} is gathered"
                self.degraded.append(Degraded(what, f"it is split on dimension {now.dim}, which the operator needs whole"))
            if (weight := stored(operand)) is not None and not now.is_whole:
                what = f"{where}: the weight {weight.meta['path']} is gathered for {_name(node)}"
                self.degraded.append(Degraded(what, "no rule lets the operator work on the weight as the policy cuts it"))
            elif not choice.has_rule:
                self.degraded.append(Degraded(f"{where}: {_name(node)} runs whole", "the operator has no rule"))

    def record_parameters(self, unit: Unit, body: Body) -> None:
        """The layout that each parameter of the unit was found to have, and the axes on which its gradient is partial."""
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            placement = value(node).layout.on(AXIS)
            axes = node.meta.get("partial_gradient", ())
            if placement.copies > 1:
                self.copied.add(name)
                axes = (AXIS if placement.is_copied else COPIES,)
            self.layouts[name] = Layout().put(AXIS, WHOLE if placement.is_copied else placement)
            if axes:
                self.partial[name] = axes

    def copies(self) -> int:
        """How many ranks hold each piece of the weights that are held in copies. Raises PolicyError where that differs."""
        found = {layout.on(AXIS).copies for layout in self.layouts.values()} - {1}
        if len(found) > 1:
            raise PolicyError(f"tensor = {self.size}: weights in {', '.join(map(str, sorted(found)))} copies in one model")
        return found.pop() if found else 1


def _pieces(placement: Placement, pieces: int, ranks: int) -> Placement:
    """The same weight in so many pieces."""
    if pieces == 1:
        return replace(placement, dim=None, copies=ranks)
    return split(placement.dim, ranks // pieces)  # type: ignore[arg-type]


def _add_partial_first(body: Body, done: Propagation, added: set[fx.Node]) -> bool:
    """Where several partial terms of a sum would be reduced one by one, add them up before the others; whether any were. A sum
    of such sums waits until these have layouts. added: the sums that were made so, each of them once."""
    changed = False
    for root in list(body.calls()):
        if root in added or not _is_sum(root) or any(_is_sum(user) and len(root.users) == 1 for user in root.users):
            continue
        terms, inner = _terms(root)
        if any(t not in done.placements for t in terms) or any(user not in done.choices for _, user, _ in inner):
            continue
        partial = [t for t in terms if done.placements[t][0].partial and value(t).shape == value(root).shape]
        reduced = sum(done.placements[t][0].partial and not done.choices[user].operands[i].partial for t, user, i in inner)
        if reduced < 2 or len(partial) < 2:
            continue
        changed = True
        total = partial[0]
        for term in (*partial[1:], *(t for t in terms if t not in partial)):
            with body.graph.inserting_before(root):
                made = body.graph.call_function(torch.ops.aten.add.Tensor, (total, term))
            made.meta = dict(root.meta)
            total = made
        root.replace_all_uses_with(total)
        added.add(total)
    if changed:
        body.graph.eliminate_dead_code()
    return changed


def _is_sum(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    return all(value(a).dtype == value(node).dtype for a in tensor_arguments(node))


def _terms(root: fx.Node) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node, int]]]:
    """What a sum adds up, in order, and every (operand, call, position) in it."""
    terms: list[fx.Node] = []
    uses: list[tuple[fx.Node, fx.Node, int]] = []
    for i, operand in enumerate(tensor_arguments(root)):
        uses.append((operand, root, i))
        if _is_sum(operand) and len(operand.users) == 1 and value(operand).shape == value(root).shape:
            more, inner = _terms(operand)
            terms += more
            uses += inner
        else:
            terms.append(operand)
    return terms, uses


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target)))


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["role"] == PARAMETER


def _at(held: Value, placement: Placement) -> Value:
    return replace(held, layout=held.layout.put(AXIS, placement))


def _set_layouts(node: fx.Node, placements: tuple[Placement, ...]) -> None:
    placed = tuple(_at(held, placement) for held, placement in zip(values(node), placements, strict=True))
    node.meta["value"] = placed[0] if isinstance(node.meta["value"], Value) else placed


def _stored(operand: fx.Node, given: dict[fx.Node, Placement]) -> Placement:
    """How an operand lies that is a placeholder, or one turned over."""
    if operand.target is torch.ops.aten.t.default and operand.args[0] in given:
        at = given[operand.args[0]]  # type: ignore[index]
        return at if at.dim is None else replace(at, dim=1 - at.dim)
    return given.get(operand, WHOLE)
