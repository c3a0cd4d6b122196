"""Put fused kernels in the place of what computes the same.

Needs: units. Kernels are found by what pieces of a body compute, not by how a model or a release of it writes them. Options
`kernels` (which may be placed) and `numerics` (whether they must have the model's bits) decide; a policy may say how many it
expects. What was noticed and not replaced is a miss, and says why.

Legality: a piece is replaced only where a proof on random numbers passes (see `pieces`), where all that it makes but its
outputs is its own, and never across a unit's border.

    f = x.to(float32); …; y = weight * (f * rsqrt(mean(f²) + eps)).to(bfloat16)        y = rms_norm(x, weight, eps=eps)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import fx

from shardcomp.errors import PolicyError, raise_all
from shardcomp.fusion import loss_head, matchers
from shardcomp.fusion.equivalence import MatchResult, Replacement, Subgraph, check_equivalent
from shardcomp.fusion.matchers import Match, MatchSite
from shardcomp.ir.program import Body, Context, Contract, Missed, Program, Unit, stored, tensor_arguments, value
from shardcomp.kernels.counts import kernel_counts, place_of
from shardcomp.kernels.rotary import rotary

CONTRACT = Contract(requires=frozenset({"canonical", "units"}), provides=frozenset({"kernels"}))

aten = torch.ops.aten


def run(program: Program, context: Context) -> Program:
    rewritten: dict[int, _Rewriting] = {}
    units = []
    missed: dict[Missed, None] = {}
    for unit in program.units:
        if id(unit.body) not in rewritten:
            rewritten[id(unit.body)] = _Rewriting(unit, program, context)
        done = rewritten[id(unit.body)]
        units.append(replace(unit, body=done.body))
        missed.update((Missed(place_of(unit, node), reason), None) for node, reason in done.missed)
    found = replace(program, units=units, missed=list(missed))
    raise_all(PolicyError, context.policy.source, _shortfalls(found, context))
    return found


def _shortfalls(program: Program, context: Context) -> Iterator[str]:
    """A message for every kernel of which there are fewer than the policy expects."""
    counts = kernel_counts(program.units)
    layers = sum(unit.kind == "layer" for unit in program.units)
    for name, expected in context.policy.expected_kernels(layers).items():
        found = counts[name]["count"] if name in counts else 0
        if found < expected and context.policy.options.places(name):
            near = [f"{miss.where}: {miss.reason}" for miss in program.missed if f" {name}" in miss.reason] or [
                f"{miss.where}: {miss.reason}" for miss in program.missed
            ]
            hint = f"; the nearest miss is {near[0]}" if near else "; nothing else was noticed"
            yield f"[kernels] expects {name} = {expected}, but {found} can be placed{hint}"


class _Rewriting:
    """One body with its kernels, and what was missed: where, and why."""

    def __init__(self, unit: Unit, program: Program, context: Context) -> None:
        self.body = unit.body.copy()
        self.missed: list[tuple[fx.Node, str]] = []
        options = context.policy.options
        self.places, self.bits = options.places, options.numerics == "hf"
        self.ranks = context.mesh.tp
        names = dict(zip((node.meta["path"] for node in self.body.placeholders("parameter")), unit.parameters, strict=True))
        words = context.policy.weight_entries(program.parameters, program.canonical_names())
        self.words = {path: words.get(program.resolve(name)) for path, name in names.items()}
        _share_tables(self.body)
        if self.places("rotary"):
            self._rotate()
        self._each(matchers.match_gated_mlp(self.body), ("swiglu", "geglu"), self._put)
        self._each(matchers.match_norms(self.body), ("rms_norm", "layer_norm", "add_rms_norm"), self._norm)
        if self.places("linear_cross_entropy"):
            # With all forwards before all backwards, the gradients of each would stand until then; and in float16 they would be
            # too small before the loss is scaled.
            waits = options.pipeline > 1 and options.schedule == "gpipe"
            self._losses(early=not waits and options.precision != "fp16")

    def _losses(self, early: bool) -> None:
        """The loss and the product that makes its logits as one."""
        for head in list(loss_head.find_loss_heads(self.body)):
            if head.product is None:
                self.missed.append((head.losses, f"it is no linear_cross_entropy: {head.obstacle}"))
                continue
            head = loss_head.move_views_before_projection(self.body, head)
            piece, proposal = loss_head.propose_kernel(head, early)
            verdict = check_equivalent(piece, [proposal], bits=False)  # one number, whose last bit is the order of a sum
            if verdict.chosen is None:
                self.missed.append((head.losses, verdict.reason))
            else:
                rows = proposal.args[0]
                _replace(self.body, piece, loss_head.rows_apart(proposal))
                if rows is not None and not rows.users and rows.op == "call_function":
                    self.body.graph.erase_node(rows)

    def _each(
        self, found: Iterable[MatchSite], names: tuple[str, ...], put: Callable[[Subgraph, Replacement], str | None]
    ) -> None:
        """Put a kernel at each place where one passes the proof; where none does, say what comes nearest to it."""
        if not any(self.places(name) for name in names):
            return
        misses: list[tuple[fx.Node, str]] = []
        for place in list(found):
            if place.anchor not in self._alive():
                continue
            piece, proposal, why = self._best(place)
            if proposal is not None and piece is not None:
                why = put(piece, proposal) or ""
            if why:
                misses.append((place.anchor, why))
        left = self._alive()
        self.missed += [(anchor, why) for anchor, why in misses if anchor in left]

    def _alive(self) -> set[fx.Node]:
        return set(self.body.graph.nodes)

    def _best(self, place: MatchSite) -> tuple[Subgraph | None, Replacement | None, str]:
        """The first piece and the first proposal for it that pass; else why the nearest does not."""
        nearest = MatchResult(None, place.hint, -1)
        for candidate in place.candidates:
            verdict = self._prove(candidate)
            if verdict.chosen is not None:
                piece, proposal = candidate.piece, candidate.proposals[verdict.chosen]
                if not (escaped := piece.escapes()):
                    return piece, proposal, ""
                verdict = MatchResult(
                    None, f"it is {proposal.name}, but {matchers.shown(escaped[0])} inside it is used elsewhere", 5
                )
            nearest = max(nearest, verdict, key=lambda each: each.progress)
        return None, None, nearest.reason

    def _prove(self, candidate: Match) -> MatchResult:
        proposals = candidate.proposals
        if not self.bits:
            once = [p for p in proposals if not (p.kwargs.get("round_first") or p.kwargs.get("round_each"))]
            verdict = check_equivalent(candidate.piece, once, bits=False)
            return verdict if verdict.chosen is None else replace(verdict, chosen=proposals.index(once[verdict.chosen]))
        return check_equivalent(candidate.piece, proposals)

    def _put(self, piece: Subgraph, proposal: Replacement) -> str | None:
        if self.places(proposal.name):
            _replace(self.body, piece, proposal)
        return None

    def _norm(self, piece: Subgraph, proposal: Replacement) -> str | None:
        """A norm, with the addition that makes its operand where there is one."""
        x = proposal.args[0]
        assert x is not None
        if self.ranks > 1 and self._is_cut(x):
            return f"it is {proposal.name}, but tensor = {self.ranks} cuts the features that it is taken over"
        if proposal.name == "rms_norm" and self.places("add_rms_norm"):
            joined = matchers.with_sum(proposal, piece)
            if joined is not None and self._prove_sum(joined):
                _replace(self.body, joined.piece, joined.proposals[0])
                return None
        return self._put(piece, proposal)

    def _prove_sum(self, joined: Match) -> bool:
        return not joined.piece.escapes() and check_equivalent(joined.piece, joined.proposals, self.bits).chosen is not None

    def _is_cut(self, x: fx.Node) -> bool:
        """Whether the policy cuts the features of a value: it is the product of a weight that is cut by its outputs."""
        width = value(x).shape[-1]
        while getattr(x.target, "overloadpacket", None) in (aten.reshape, aten.to) and value(x).shape[-1] == width:
            x = x.args[0]  # type: ignore[assignment]
        weight = stored(x.args[1]) if x.target is aten.linear.default else None
        return weight is not None and value(x).shape[-1] == width and self.words.get(weight.meta["path"]) == "colwise"

    def _rotate(self) -> None:
        """Rotations by the same tables, two by two: queries and keys."""
        singles: dict[Hashable, list[tuple[fx.Node, Subgraph, Replacement]]] = {}
        for place in list(matchers.match_rotary(self.body)):
            piece, proposal, why = self._best(place)
            if piece is None or proposal is None:
                self.missed.append((place.anchor, why))
                continue
            alike = (proposal.args[2:], tuple(proposal.kwargs.items()))
            waiting = singles.setdefault(alike, [])
            if waiting and (joined := _together(waiting[0], (place.anchor, piece, proposal))) is not None:
                waiting.pop(0)
                _replace(self.body, *joined)
            else:
                waiting.append((place.anchor, piece, proposal))
        for anchor, *_ in (each for waiting in singles.values() for each in waiting):
            self.missed.append((anchor, "it is rotary, but nothing else is turned by the same tables"))


_Single = tuple[fx.Node, Subgraph, Replacement]


def _together(one: _Single, other: _Single) -> tuple[Subgraph, Replacement] | None:
    """Two rotations as one; None where the one is made of the other, or their shapes do not go together."""
    pieces = [one[1], other[1]]
    x, y = one[2].args[0], other[2].args[0]
    assert x is not None and y is not None
    if matchers.reaches(pieces[0].outputs[0], y) or matchers.reaches(pieces[1].outputs[0], x):
        return None
    order = (0, 1)
    if matchers.attended(pieces[1].outputs[0]) == 0 or not matchers.pairs(x, y):
        order = (1, 0)
    q, k = ((x, y)[i] for i in order)
    if not matchers.pairs(q, k):
        return None
    nodes = tuple(node for node in x.graph.nodes if node in pieces[0].nodes or node in pieces[1].nodes)
    cos, sin = one[2].args[2:]
    outputs = tuple(pieces[i].outputs[0] for i in order)
    piece = Subgraph(nodes, (q, k, cos, sin), outputs)  # type: ignore[arg-type]
    return piece, Replacement(rotary, (q, k, cos, sin), one[2].kwargs, (0, 1))


def _share_tables(body: Body) -> None:
    """Calls without a gradient that are the same become one call: a model may make its tables anew for queries and for keys."""
    known: dict[Hashable, fx.Node] = {}
    for node in list(body.calls()):
        held = node.meta["value"]
        if not isinstance(held, tuple) and (held.requires_grad or "random" in node.kwargs) or not tensor_arguments(node):
            continue
        if isinstance(held, tuple) and any(each.requires_grad for each in held):
            continue
        numbers = fx.map_arg((node.args, node.kwargs), lambda argument: _Name(argument.name))
        first = known.setdefault((node.target, repr(numbers), repr(held)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            body.graph.erase_node(node)


class _Name:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"%{self.name}"


def _replace(body: Body, piece: Subgraph, proposal: Replacement) -> None:
    """Call the kernel where the last of its operands is there, and drop the piece."""
    graph = body.graph
    place = {node: i for i, node in enumerate(graph.nodes)}
    last = max(piece.inputs, key=lambda node: place[node])
    if last.op == "placeholder":
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    first = piece.outputs[0]
    with graph.inserting_after(last):
        made = graph.call_function(proposal.function, proposal.args, dict(proposal.kwargs))
    made.meta = dict(first.meta)
    if proposal.used is None:
        results = [made]
    else:
        made.meta["value"] = tuple(out.meta["value"] for out in piece.outputs)
        results = []
        for index, out in reversed(list(enumerate(piece.outputs))):
            with graph.inserting_after(made):
                item = graph.call_function(operator.getitem, (made, index))
            item.meta = dict(out.meta)
            results.insert(0, item)
    for out, result in zip(piece.outputs, results, strict=True):
        out.replace_all_uses_with(result)
    for node in reversed(piece.nodes):
        if not node.users:
            graph.erase_node(node)
    _in_order(graph)


def _in_order(graph: fx.Graph) -> None:
    """Move calls behind what they read, and leave the others in their order."""
    done: set[fx.Node] = set()
    end = next(node for node in reversed(graph.nodes) if node.op == "output")

    def place(node: fx.Node) -> None:
        if node not in done:
            done.add(node)
            for operand in node.all_input_nodes:
                place(operand)
            end.prepend(node)

    for node in list(graph.nodes):
        if node is not end:
            place(node)
