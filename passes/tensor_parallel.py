"""Tensor and sequence parallelism: give every value a layout, and insert the collectives that the layouts need.

The policy says how each weight is split, and `sharding.propagation` chooses how each call is split. Where a value has another
placement than a call needs, a collective reshards it, once per value and target. The gradient law says where the backward
needs one: a replicated operand combined with a sharded one receives a partial gradient on each rank, and it must be reduced.

Legality: the forward and the backward of each collective are adjoint. So a call on sharded operands gives a shard of what it
gave on replicated ones, and each gradient is replicated, sharded like its value, or recorded as partial on its parameter. At
the boundary of a unit a value is replicated or sharded, never partial, and its gradient has the same placement. So units are
legal by themselves, and each body is rewritten once for each layout that its inputs come in.

    h = norm(x); q = linear(h, Wq)         h = norm(x); g = allgather_reducescatter(h); q = linear(g, Wq local)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from shardcomp.errors import InternalError, PlanError, PolicyError, raise_all
from shardcomp.ir.layout import REPLICATED, Layout, Placement, split
from shardcomp.ir.nodes import has_one_result, is_parameter, path_of, requires_grad, stored, tensor_arguments, value, values
from shardcomp.ir.operators import operator_name
from shardcomp.ir.program import INPUT, PARAMETER, Body, Context, Contract, Degraded, Program, S, Unit, Value
from shardcomp.kernels.dropout import stream_for
from shardcomp.kernels.embedding import scales_by_frequency
from shardcomp.sharding.propagation import AxisSplit, Propagation, boundary_placement, propagate, refine
from shardcomp.sharding.reshard import reshard_steps
from shardcomp.sharding.rules import factoring, unfuse
from shardcomp.sharding.weight_dims import UNEVEN, key_value_weights, module_of, weight_layouts

CONTRACT = Contract(requires=frozenset({"canonical", "units"}), provides=frozenset({"layouts"}))
AXIS = "tp"
COPIES = "tp_rep"
"""The factor of the axis along which ranks have the same shard."""


def run(program: Program, context: Context) -> Program:
    size = context.mesh.size(AXIS)
    layouts, unsplit_weights = weight_layouts(program, context.policy, AXIS, size)
    raise_all(PlanError, f"{program.name} with {context.policy.source}", _partly_counted(program, context, layouts))
    # Weights of several units, such as a tied embedding and head. A rewrite of one unit does not know the uses in the others.
    shared = {name for unit in program.units for name in unit.parameters if _owners(program, name) > 1}
    rewrite = _Rewrite(program, context, layouts, shared)
    layouts_of = {name: Layout() for name in program.inputs}
    memo: dict[Any, tuple[Body, tuple[Layout, ...]]] = {}
    units = []
    for unit in program.units:
        # Units that share a body may get their inputs in different layouts. Each combination has its own rewritten body.
        key = (id(unit.body), tuple(layouts_of[name] for name in unit.inputs), _finals(unit, program))
        if key not in memo:
            memo[key] = rewrite.body(unit, [layouts_of[name] for name in unit.inputs], len([k for k in memo if k[0] == key[0]]))
        body, results = memo[key]
        layouts_of.update(zip(unit.outputs, results, strict=True))
        units.append(replace(unit, body=body))
        rewrite.record_parameters(unit, body)
    violations = rewrite.violations()
    reported_modules = tuple(violations)
    # `weight_layouts` looks at rows alone. A weight that got copies of fewer shards, such as two key-value heads on four ranks,
    # need not have rows for every rank.
    if not violations and not rewrite.stuck:
        unsplit_weights = {name: text for name, text in unsplit_weights.items() if name not in rewrite.copied}
    # One message for one cause: the modules that cannot keep their split have theirs already.
    unsplit_messages = [
        text for name, text in unsplit_weights.items() if not any(name.startswith(where + ".") for where in reported_modules)
    ]
    raise_all(PolicyError, f"{context.policy.source} with tensor = {size}", [*violations.values(), *unsplit_messages])
    if rewrite.stuck:
        raise InternalError(f"tensor: no layout of the operands of {', '.join(rewrite.stuck)}")
    # From here on, tp has two factors where weights have copies (see `Mesh`).
    mesh = replace(context.mesh, copies=rewrite.copies())
    parameters = {
        name: replace(p, layout=rewrite.layouts.get(name, Layout()), partial_gradient=rewrite.partial.get(name, ()))
        for name, p in program.parameters.items()
    }
    known = {name: replace(v, layout=layouts_of.get(name, v.layout)) for name, v in program.values.items()}
    degraded = list(dict.fromkeys(program.degraded + rewrite.degraded))
    return replace(program, units=units, parameters=parameters, values=known, degraded=degraded, mesh=mesh)


def _partly_counted(program: Program, context: Context, layouts: dict[str, Layout]) -> list[str]:
    """What is wrong with embeddings that divide a row's gradient by how often the whole batch has it, where a
    rank or micro-batch sees only part of the batch."""
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
            # Split by columns, each rank still looks up and counts all tokens.
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
    """Which of a unit's results leave the program: those need no placement of a boundary."""
    return tuple(name in program.outputs.values() for name in unit.outputs)


@dataclass
class _Use:
    """A value as one call needs it: its placement, and whether the gradient that comes back is partial."""

    placement: Placement
    partial_gradient: bool


class _Rewrite:
    """Rewrites bodies for one axis, and gathers what it learns about parameters on the way."""

    def __init__(self, program: Program, context: Context, layouts: dict[str, Layout], shared: set[str]) -> None:
        self.program, self.size = program, context.mesh.size(AXIS)
        # The dimension of this length is the sequence: the symbol s, or the one length that the model exports for.
        length = program.static_shape[1] if program.static_shape else S
        self.axis_split = AxisSplit(self.size, length if context.policy.options.sequence_parallel else None)
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
        # graph_copy returns the results and makes no output node.
        results = graph.graph_copy(unit.body.graph, copied)
        for old, new in copied.items():
            new.meta = dict(old.meta)
        graph.output(results)
        body = Body(unit.body.name + (f"{copies + 1}" if copies else ""), graph)
        if self.size == 1:
            return body, tuple(Layout() for _ in body.results)
        placements = {node: layout.on(AXIS) for node, layout in zip(body.placeholders(INPUT), inputs, strict=True)}
        heads = {weight: count for _, weight, count in key_value_weights(body)}
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            placements[node] = self._initial(node, name, heads.get(node))
        # Before propagation, since the calls that it makes need choices as well.
        self._separate_additions(body, placements)
        propagation = self._propagate(unit, body, placements)
        added: set[fx.Node] = set()
        # Adding partial terms first makes new calls, which need choices, and may let further sums be reordered.
        while _add_partial_first(body, propagation, added):
            propagation = self._propagate(unit, body, placements)
        # Only now: `_propagate` may have given a weight fewer shards than the policy asks for.
        for node, placement in placements.items():
            node.meta["value"] = _at(value(node), placement)
        self._convert(unit, body, propagation)
        return body, tuple(value(node).layout for node in body.results)

    def _initial(self, node: fx.Node, name: str, heads: int | None) -> Placement:
        """Where a weight starts: with more ranks than rows or `heads`, or rows that they do not divide, in fewer shards."""
        placement = self.layouts.get(name, Layout()).on(AXIS)
        if placement.dim is None or self.words.get(name) in UNEVEN:
            return placement
        # The largest number of equal shards that the ranks can share evenly.
        shards = math.gcd(int(value(node).shape[placement.dim]), self.size)
        # Two heads of 16 rows would divide over four ranks, but attention needs full heads: one shard for each head.
        if heads is not None and self.size % heads == 0:
            shards = heads
        if shards == 1 and heads != 1:  # a single head is the one shard that every rank has
            return placement
        return _with_shards(placement, shards, self.size)

    def _propagate(self, unit: Unit, body: Body, placements: dict[fx.Node, Placement]) -> Propagation:
        """Propagate. A weight loses its split where there are more ranks than shards, as with key-value heads: then several
        ranks have the same shard, and `placements` says so afterwards."""
        propagation = first = propagate(body, self.axis_split, placements)
        tried = dict(placements)
        # Each round gives the weights behind a lost split fewer shards, one per head (`lost.size`), until nothing changes.
        while propagation.indivisible:
            before = dict(tried)
            for lost in propagation.indivisible:
                for weight in lost.origins:
                    if self.size % lost.size == 0:
                        tried[weight] = _with_shards(tried[weight], lost.size, self.size)
            if tried == before:
                break
            propagation = propagate(body, self.axis_split, tried)
        if propagation.indivisible or propagation.stuck:
            # The first attempt speaks of the split that the policy asks for; the later ones of splits that were tried here.
            self._report(unit, first)
            self.stuck += [f"{module_of(unit, node)}: {operator_name(node)}" for node in propagation.stuck]
            return first
        placements.update(tried)
        return refine(body, self.axis_split, placements, _finals(unit, self.program))

    def _separate_additions(self, body: Body, placements: dict[fx.Node, Placement]) -> None:
        """Take the bias out of a product whose weight is split along what it contracts: it is added once, after the
        reduction."""
        for node in list(body.calls()):
            product = unfuse(node)
            rule = factoring(node)
            if product is None or rule is None:
                continue
            result_factors = {factor for dims in rule.results for factor in dims}
            placed = [
                (_stored_placement(operand, placements), dims)
                for operand, dims in zip(tensor_arguments(node), rule.operands, strict=True)
            ]
            split_factors = [dims[at.dim] for at, dims in placed if at.dim is not None]
            # No contracted factor is split, so the result is not partial and the bias may stay.
            if all(factor in result_factors for factor in split_factors):
                continue
            target, arguments, added = product
            with body.graph.inserting_before(node):
                without_bias = body.graph.call_function(target, arguments)
                without_bias.meta = dict(node.meta)
                total = body.graph.call_function(torch.ops.aten.add.Tensor, (without_bias, added))
                total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            body.graph.erase_node(node)

    def _report(self, unit: Unit, propagation: Propagation) -> None:
        for lost in propagation.indivisible:
            self.indivisible.setdefault(module_of(unit, lost.node), set()).add(lost.size)

    def violations(self) -> dict[str, str]:
        """For every module that cannot keep its split: the sizes that do not divide, and the degrees that would."""
        messages = {}
        for where, sizes in self.indivisible.items():
            named = " and ".join(self._named_sizes(size) for size in sorted(sizes, reverse=True))
            legal = ", ".join(str(n) for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes))
            messages[where] = f"{where}: {named} cannot be split over tensor = {self.size}: use {legal}"
        return messages

    def _named_sizes(self, size: int) -> str:
        """The size with the names of the configuration's keys that hold it, such as a number of heads."""
        settings = self.program.config.to_dict() if hasattr(self.program.config, "to_dict") else {}
        # `type`, because isinstance takes True for a number.
        keys = [key for key, setting in settings.items() if type(setting) is int and setting == size and "head" in key]
        return " = ".join([*keys, str(size)]) if keys else f"a dimension of {size}"

    def _convert(self, unit: Unit, body: Body, propagation: Propagation) -> None:
        """Insert the collectives, set every node's layout, and replace the calls that have a split form by it."""
        # Calls that need the same of the same value share one collective. The cost model counts it once, too.
        cache: dict[tuple[fx.Node, Placement, bool], fx.Node] = {}
        mixed = self._mixed_parameters(unit, body, propagation)
        for node in list(body.graph.nodes):
            if node.op == "placeholder":
                continue
            if node.op == "output":
                finals = _finals(unit, self.program)
                results = []
                for result, final in zip(body.results, finals, strict=True):
                    target = boundary_placement(value(result), propagation.placements[result][0], final, self.axis_split)
                    # At a boundary, the gradient that comes back is never partial.
                    results.append(self._reshard(body, result, propagation, _Use(target, False), node, cache, mixed))
                node.args = (tuple(results),)
                continue
            choice = propagation.choices[node]
            operands = tensor_arguments(node)
            graded = requires_grad(node)
            resharded = []
            for operand, placement, partial in zip(operands, choice.operands, choice.partial_gradient, strict=True):
                # Only `getitem` reads a tuple, and it takes each result in the placement that it has.
                has_several_results = not has_one_result(operand)
                use = _Use(placement, partial and graded)
                resharded.append(
                    operand if has_several_results else self._reshard(body, operand, propagation, use, node, cache, mixed)
                )
            self._note_degraded(unit, node, operands, propagation)
            # map_arg visits the nodes in the order of `tensor_arguments`.
            in_order = iter(resharded)
            node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda _, order=in_order: next(order))
            _set_layouts(node, choice.results)
            # Only now is it known whether a dropout draws one mask on all ranks, or each rank a mask for its own shard.
            if "random" in node.kwargs:
                node.kwargs = {**node.kwargs, "random": stream_for(node, choice.results[0])}
            # A split form sends its own messages. `cost.communication` looks for their axis in the last argument.
            if choice.form is not None:
                node.args = (*choice.form.arguments(node), AXIS)
                node.kwargs = {}
                node.meta["form"] = choice.form
                node.target = choice.form.function

    def _mixed_parameters(self, unit: Unit, body: Body, propagation: Propagation) -> set[fx.Node]:
        """Replicated parameters that may not be recorded as having a partial gradient: another use gives them a replicated
        one."""
        mixed = set()
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            uses = [
                propagation.choices[user].partial_gradient[i]
                for user in node.users
                if user.op == "call_function" and requires_grad(user)
                for i, operand in enumerate(tensor_arguments(user))
                if operand is node and propagation.choices[user].operands[i].is_replicated
            ]
            # Uses with a partial gradient then get an `identity_allreduce`, in place of one reduction per step.
            if name in self.shared or len(set(uses)) > 1:
                mixed.add(node)
        return mixed

    def _reshard(
        self,
        body: Body,
        operand: fx.Node,
        propagation: Propagation,
        use: _Use,
        user: fx.Node,
        cache: dict[tuple[fx.Node, Placement, bool], fx.Node],
        mixed: set[fx.Node],
    ) -> fx.Node:
        """`operand` as `use` needs it: resharded by a collective where its placement differs, once per value and need."""
        now = propagation.placements[operand][0]
        tensor = value(operand)
        partial = (
            use.partial_gradient
            and tensor.requires_grad
            and use.placement.is_replicated
            and operand not in propagation.passed_back
        )
        if now.is_replicated and use.placement.is_replicated and partial and is_parameter(operand) and operand not in mixed:
            # No collective for a replicated weight: the runtime reduces its partial gradient once per step.
            operand.meta["partial_gradient"] = (AXIS,)
            return operand
        key = (operand, use.placement, partial)
        if key not in cache:
            resharded = operand
            # Before the first user. Users come in the graph's order, so the later ones find the collective before them.
            for target, arguments, placement in reshard_steps(now, use.placement, partial, tensor.requires_grad, self.size):
                with body.graph.inserting_before(user):
                    node = body.graph.call_function(target, (resharded, *arguments, AXIS))
                node.meta = {"path": path_of(user), "value": _at(tensor, placement)}
                resharded = node
            cache[key] = resharded
        return cache[key]

    def _note_degraded(self, unit: Unit, node: fx.Node, operands: list[fx.Node], propagation: Propagation) -> None:
        """Record what is correct but slower than it could be: an operator without a rule, a weight that is gathered."""
        where = module_of(unit, node) or node.name
        choice = propagation.choices[node]
        rule = factoring(node)
        for i, (operand, needed) in enumerate(zip(operands, choice.operands, strict=True)):
            now = propagation.placements[operand][0]
            if now == needed or (now.is_replicated and not choice.form) or (now.is_copied and needed.is_replicated):
                continue
            if rule is not None and now.dim is not None and rule.operands[i][now.dim] is None and stored(operand) is None:
                what = f"{where}: an operand of {operator_name(node)} is gathered"
                self.degraded.append(Degraded(what, f"it is split on dimension {now.dim}, which the operator needs replicated"))
            if (weight := stored(operand)) is not None and not now.is_replicated:
                what = f"{where}: the weight {weight.meta['path']} is gathered for {operator_name(node)}"
                self.degraded.append(Degraded(what, "no rule lets the operator work on the weight as the policy splits it"))
            elif not choice.has_rule:
                self.degraded.append(
                    Degraded(f"{where}: {operator_name(node)} runs on replicated operands", "the operator has no rule")
                )

    def record_parameters(self, unit: Unit, body: Body) -> None:
        """The layout that each parameter of the unit was found to have, and the axes on which its gradient is partial."""
        for node, name in zip(body.placeholders(PARAMETER), unit.parameters, strict=True):
            placement = value(node).layout.on(AXIS)
            axes = node.meta.get("partial_gradient", ())
            if placement.copies > 1:
                self.copied.add(name)
                # All ranks of tp have summands of the gradient of a single shard. Of several, only ranks with the same one.
                axes = (AXIS if placement.is_copied else COPIES,)
            self.layouts[name] = Layout().put(AXIS, REPLICATED if placement.is_copied else placement)
            if axes:
                self.partial[name] = axes

    def copies(self) -> int:
        """How many ranks have the same shard, of the weights with copies. Raises PolicyError where weights differ in that."""
        # The mesh factors tp only once, so all weights with copies must agree.
        counts = {layout.on(AXIS).copies for layout in self.layouts.values()} - {1}
        if len(counts) > 1:
            raise PolicyError(f"tensor = {self.size}: weights in {', '.join(map(str, sorted(counts)))} copies in one model")
        return counts.pop() if counts else 1


def _with_shards(placement: Placement, shards: int, ranks: int) -> Placement:
    """The same weight in so many shards."""
    if shards == 1:
        return replace(placement, dim=None, copies=ranks)
    return split(placement.dim, ranks // shards)  # type: ignore[arg-type]


def _add_partial_first(body: Body, propagation: Propagation, added: set[fx.Node]) -> bool:
    """Where several partial terms of a sum would be reduced one by one, add them up before the others. Returns whether the
    graph changed. A sum of such sums waits until these have layouts. added: the sums that were made so, each of them once."""
    changed = False
    for root in list(body.calls()):
        # Start at the outermost sum of a chain: the inner sums are found as its terms.
        if root in added or not _is_sum(root) or any(_is_sum(user) and len(root.users) == 1 for user in root.users):
            continue
        terms, inner = _terms(root)
        # A sum that this round made has no placement yet. The next round looks at it again.
        if any(t not in propagation.placements for t in terms) or any(user not in propagation.choices for _, user, _ in inner):
            continue
        partial = [t for t in terms if propagation.placements[t][0].partial and value(t).shape == value(root).shape]
        # How many terms are reduced just before they are added. With fewer than two there is nothing to save.
        reduced = sum(
            propagation.placements[t][0].partial and not propagation.choices[user].operands[i].partial for t, user, i in inner
        )
        if reduced < 2 or len(partial) < 2:
            continue
        changed = True
        # A layer with a parallel residual: x + attention + mlp becomes (attention + mlp) + x, with one reduction and not two.
        total = partial[0]
        for term in (*partial[1:], *(t for t in terms if t not in partial)):
            with body.graph.inserting_before(root):
                sum_so_far = body.graph.call_function(torch.ops.aten.add.Tensor, (total, term))
            sum_so_far.meta = dict(root.meta)
            total = sum_so_far
        root.replace_all_uses_with(total)
        added.add(total)
    if changed:
        body.graph.eliminate_dead_code()
    return changed


def _is_sum(node: fx.Node) -> bool:
    # With `alpha`, with a number, or with a cast in it, an addition is no plain sum, and its terms keep their places.
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    return all(value(a).dtype == value(node).dtype for a in tensor_arguments(node))


def _terms(root: fx.Node) -> tuple[list[fx.Node], list[tuple[fx.Node, fx.Node, int]]]:
    """What a sum adds up, in order, and every (operand, call, position) in it."""
    terms: list[fx.Node] = []
    uses: list[tuple[fx.Node, fx.Node, int]] = []
    for i, operand in enumerate(tensor_arguments(root)):
        uses.append((operand, root, i))
        # A sum that something else reads as well is needed as it is, and so is a term.
        if _is_sum(operand) and len(operand.users) == 1 and value(operand).shape == value(root).shape:
            more, inner = _terms(operand)
            terms += more
            uses += inner
        else:
            terms.append(operand)
    return terms, uses


def _at(tensor: Value, placement: Placement) -> Value:
    return replace(tensor, layout=tensor.layout.put(AXIS, placement))


def _set_layouts(node: fx.Node, placements: tuple[Placement, ...]) -> None:
    placed = tuple(_at(result, placement) for result, placement in zip(values(node), placements, strict=True))
    node.meta["value"] = placed[0] if has_one_result(node) else placed


def _stored_placement(operand: fx.Node, placements: dict[fx.Node, Placement]) -> Placement:
    """The placement of an operand that is a placeholder, maybe transposed."""
    if operand.target is torch.ops.aten.t.default and operand.args[0] in placements:
        # A transpose exchanges dimensions 0 and 1.
        at = placements[operand.args[0]]  # type: ignore[index]
        return at if at.dim is None else replace(at, dim=1 - at.dim)
    return placements.get(operand, REPLICATED)
