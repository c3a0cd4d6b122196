"""Replace subgraphs by fused kernels that compute the same.

A kernel is found by what a subgraph computes, not by how a model or a release of it writes that. The options decide: `kernels`
says which kernels may be placed, and `numerics` whether they must give the model's bits. A policy may say how many kernels it
expects. A place that was noticed and not replaced is a miss, and the report says why.

Legality: a subgraph is replaced only where the check on random numbers passes (see `fusion.equivalence`), where nothing outside
reads any of its values but its outputs, and never across the boundary of a unit.

    f = x.to(float32); …; y = weight * (f * rsqrt(mean(f²) + eps)).to(bfloat16)        y = rms_norm(x, weight, eps=eps)
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import fx

from shardcomp.errors import PolicyError, raise_all
from shardcomp.fusion import loss_head, matchers
from shardcomp.fusion.equivalence import MatchResult, Replacement, Subgraph, check_equivalent
from shardcomp.fusion.matchers import MATCHERS, Match, Matcher, MatchSite, Proven
from shardcomp.ir.nodes import path_of, stored, structural_arguments, tensor_arguments, value
from shardcomp.ir.operators import operator_of
from shardcomp.ir.program import Body, Context, Contract, Missed, Program, Unit
from shardcomp.kernels.counts import kernel_counts, place_of

CONTRACT = Contract(requires=frozenset({"canonical", "units"}), provides=frozenset({"kernels"}))

aten = torch.ops.aten


def run(program: Program, context: Context) -> Program:
    rewritten: dict[int, _Rewriting] = {}
    units = []
    missed: dict[Missed, None] = {}
    for unit in program.units:
        if id(unit.body) not in rewritten:
            # Once per body, since alike units share it; a miss is still reported for each unit.
            rewritten[id(unit.body)] = _Rewriting(unit, program, context)
        rewriting = rewritten[id(unit.body)]
        units.append(replace(unit, body=rewriting.body))
        missed.update((Missed(place_of(unit, node), reason), None) for node, reason in rewriting.missed)
    fused = replace(program, units=units, missed=list(missed))
    raise_all(PolicyError, context.policy.source, _shortfalls(fused, context))
    return fused


def _shortfalls(program: Program, context: Context) -> Iterator[str]:
    """A message for every kernel of which there are fewer than the policy expects."""
    counts = kernel_counts(program.units)
    layers = sum(unit.kind == "layer" for unit in program.units)
    for name, expected in context.policy.expected_kernels(layers).items():
        placed = counts[name]["count"] if name in counts else 0
        if placed < expected and context.policy.options.places(name):
            # A miss that names this kernel says most. Any other is better than none.
            near = [f"{miss.where}: {miss.reason}" for miss in program.missed if f" {name}" in miss.reason] or [
                f"{miss.where}: {miss.reason}" for miss in program.missed
            ]
            hint = f"; the nearest miss is {near[0]}" if near else "; nothing else was noticed"
            yield f"[kernels] expects {name} = {expected}, but {placed} can be placed{hint}"


class _Rewriting:
    """One body with its kernels, and what was missed: where, and why."""

    def __init__(self, unit: Unit, program: Program, context: Context) -> None:
        self.body = unit.body.copy()
        self.missed: list[tuple[fx.Node, str]] = []
        options = context.policy.options
        self.places, self.bits = options.places, options.numerics == "hf"
        self.ranks = context.mesh.tp
        self.tokens = context.batch * context.length
        names = dict(zip((path_of(node) for node in self.body.placeholders("parameter")), unit.parameters, strict=True))
        words = context.policy.weight_entries(program.parameters, program.canonical_names())
        self.words = {path: words.get(program.resolve(name)) for path, name in names.items()}
        # First, because two rotations become one call only where both read the same tables.
        _share_tables(self.body)
        self.alive = set(self.body.graph.nodes)
        for matcher in MATCHERS:
            if any(self.places(name) for name in matcher.kernels):
                self._place_kernels(matcher)
        if self.places("linear_cross_entropy"):
            # With all forwards before all backwards, the gradients of each would stand until then; and in float16 they would be
            # too small before the loss is scaled.
            waits = options.pipeline > 1 and options.schedule == "gpipe"
            self._losses(early=not waits and options.precision != "fp16")

    def _losses(self, early: bool) -> None:
        """Fuse the loss with the product that makes its logits."""
        for head in list(loss_head.find_loss_heads(self.body)):
            if head.product is None:
                self.missed.append((head.losses, f"it is no linear_cross_entropy: {head.violation}"))
                continue
            head = loss_head.move_views_before_projection(self.body, head)
            subgraph, replacement = loss_head.propose_kernel(head, early, self.tokens)
            result = check_equivalent(subgraph, [replacement], bits=False)  # one number, whose last bit is the order of a sum
            if result.chosen is None:
                self.missed.append((head.losses, result.reason))
            else:
                rows = replacement.args[0]
                self._replace(subgraph, loss_head.rows_apart(replacement))
                if rows is not None and not rows.users and rows.op == "call_function":
                    self.body.graph.erase_node(rows)

    def _place_kernels(self, matcher: Matcher) -> None:
        """Put a kernel around each call where one passes the check; where none does, note what comes nearest."""
        misses: list[tuple[fx.Node, str]] = []
        waiting: dict[fx.Node, str] = {}
        for anchor in list(self.body.calls()):
            # Matched now and not all at the start: a replacement gives the calls that read its results other operands.
            site = matcher.match(anchor) if anchor in self.alive else None
            if site is None:
                continue
            proven, why = self._best(site)
            if proven is None:
                misses.append((anchor, why))
            elif matcher.join is None:
                misses += [(anchor, why)] if (why := self._put(matcher, *proven)) else []
            elif not self._join(matcher, proven, waiting):
                waiting[anchor] = f"it is {proven[1].name}, but nothing else is turned by the same tables"
        # A call that is gone by now became part of another kernel, and was no miss.
        self.missed += [(anchor, why) for anchor, why in (*misses, *waiting.items()) if anchor in self.alive]

    def _join(self, matcher: Matcher, proven: Proven, waiting: dict[fx.Node, str]) -> bool:
        """Put one kernel in the place of two subgraphs that do the same: this one, and one that waits for another."""
        assert matcher.join is not None
        for anchor in waiting:
            # Matched again: kernels placed since then may have given the waiting call other operands.
            site = matcher.match(anchor) if anchor in self.alive else None
            other = None if site is None else self._best(site)[0]
            joined = None if other is None else matcher.join(other, proven)
            if joined is not None:
                del waiting[anchor]
                self._replace(*joined)
                return True
        return False

    def _best(self, site: MatchSite) -> tuple[Proven | None, str]:
        """The first subgraph, and the first replacement for it, that pass the check; else why the nearest does not."""
        nearest = MatchResult(None, site.hint, -1)
        for match in site.matches:
            result = self._prove(match)
            if result.chosen is not None:
                subgraph, replacement = match.subgraph, match.replacements[result.chosen]
                # A value inside that is read outside must stay. A smaller match may still leave it out.
                if not (escaped := subgraph.escapes()):
                    return (subgraph, replacement), ""
                result = MatchResult(
                    None, f"it is {replacement.name}, but {matchers.shown(escaped[0])} inside it is used elsewhere", 5
                )
            nearest = max(nearest, result, key=lambda result: result.progress)
        return None, nearest.reason

    def _prove(self, match: Match) -> MatchResult:
        replacements = match.replacements
        if not self.bits:
            # Without a need for the model's bits, the variants that copy its rounding are not wanted.
            rounding_once = [p for p in replacements if not (p.kwargs.get("round_first") or p.kwargs.get("round_each"))]
            result = check_equivalent(match.subgraph, rounding_once, bits=False)
            return result if result.chosen is None else replace(result, chosen=replacements.index(rounding_once[result.chosen]))
        return check_equivalent(match.subgraph, replacements)

    def _put(self, matcher: Matcher, subgraph: Subgraph, replacement: Replacement) -> str:
        """Put a kernel in the place of a subgraph, or of a larger one. Returns why it cannot be, empty where it can."""
        x = replacement.args[0]
        assert x is not None
        # OLMo 2 normalizes all heads of q at once, and tensor parallelism splits these heads over ranks.
        if matcher.whole_features and self.ranks > 1 and self._is_sharded(x):
            return f"it is {replacement.name}, but tensor = {self.ranks} splits the features that it is taken over"
        larger = matcher.extend(subgraph, replacement) if matcher.extend is not None else None
        if larger is not None and self.places(larger.replacements[0].name) and self._is_proved(larger):
            self._replace(larger.subgraph, larger.replacements[0])
        elif self.places(replacement.name):
            self._replace(subgraph, replacement)
        return ""

    def _is_proved(self, match: Match) -> bool:
        """Whether the one replacement of a match passes the check."""
        return (
            not match.subgraph.escapes() and check_equivalent(match.subgraph, match.replacements, self.bits).chosen is not None
        )

    def _replace(self, subgraph: Subgraph, replacement: Replacement) -> None:
        _replace(self.body, subgraph, replacement)
        self.alive = set(self.body.graph.nodes)

    def _is_sharded(self, x: fx.Node) -> bool:
        """Whether the policy shards the features of a value: it is the product of a weight that is split by its outputs."""
        width = value(x).shape[-1]
        # A reshape that changes the last dimension, as into heads, gives each rank whole heads: a norm per head is not sharded.
        while operator_of(x) in (aten.reshape, aten.to) and value(x).shape[-1] == width:
            x = x.args[0]  # type: ignore[assignment]
        weight = stored(x.args[1]) if x.target is aten.linear.default else None
        return weight is not None and value(x).shape[-1] == width and self.words.get(path_of(weight)) == "colwise"


def _share_tables(body: Body) -> None:
    """Calls without a gradient that are the same become one call: a model may make its tables anew for queries and for keys."""
    known: dict[Hashable, fx.Node] = {}
    numbers = {node: number for number, node in enumerate(body.graph.nodes)}
    for node in list(body.calls()):
        results = node.meta["value"]
        if not isinstance(results, tuple) and (results.requires_grad or "random" in node.kwargs) or not tensor_arguments(node):
            continue
        if isinstance(results, tuple) and any(result.requires_grad for result in results):
            continue
        first = known.setdefault((node.target, structural_arguments(node, numbers), repr(results)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            body.graph.erase_node(node)


def _replace(body: Body, subgraph: Subgraph, replacement: Replacement) -> None:
    """Call the kernel where the last of its operands is there, and drop the subgraph."""
    graph = body.graph
    place = {node: i for i, node in enumerate(graph.nodes)}
    # Right after its last operand, and not where the subgraph ends: readers of an early output may come before that.
    last = max(subgraph.inputs, key=lambda node: place[node])
    if last.op == "placeholder":
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    first = subgraph.outputs[0]
    with graph.inserting_after(last):
        fused = graph.call_function(replacement.function, replacement.args, dict(replacement.kwargs))
    fused.meta = dict(first.meta)
    if replacement.used is None:
        results = [fused]
    else:
        fused.meta["value"] = tuple(out.meta["value"] for out in subgraph.outputs)
        results = []
        # Each item goes right after the call, so the last one is inserted first.
        for index, out in reversed(list(enumerate(subgraph.outputs))):
            with graph.inserting_after(fused):
                item = graph.call_function(operator.getitem, (fused, index))
            item.meta = dict(out.meta)
            results.insert(0, item)
    for out, result in zip(subgraph.outputs, results, strict=True):
        out.replace_all_uses_with(result)
    for node in reversed(subgraph.nodes):  # readers first, so that what they read loses its users
        if not node.users:
            graph.erase_node(node)
    # A reader of one output may still stand before an operand that only another output needs.
    _in_order(graph)


def _in_order(graph: fx.Graph) -> None:
    """Move calls after what they read, and leave the others in their order."""
    placed: set[fx.Node] = set()
    end = next(node for node in reversed(graph.nodes) if node.op == "output")

    def place(node: fx.Node) -> None:
        if node not in placed:
            placed.add(node)
            for operand in node.all_input_nodes:
                place(operand)
            end.prepend(node)

    for node in list(graph.nodes):
        if node is not end:
            place(node)
