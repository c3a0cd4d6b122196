"""Keep leading dimensions apart that the model merges for a while, so that a minor one of them can be sharded.

Models write [b, s, h] as [b·s, h], or [b, n, s, d] as [b·n, s, d], compute on that, and split it again. A split of the
sequence or of the heads is along the minor factor of the merged dimension, and no layout can say so. This pass repeats each
call between a merge and the reshape that undoes it, on twins of its operands whose dimensions were never merged. A call that
reads the merged value and is not repeated is given the twin, merged. Calls that lead to no such reshape stay as they are, for
example the loss over [b·s, v].

Legality: a merge renames indices. A call that treats the rows of dimension 0 alike and independently computes the same number
for each, whatever they are called. Its other dimensions move to the right by as many as the merge took. An operand that no
merge made is split before the call.

    f = reshape(x, [b·s, h]); g = relu(linear(f, W)); y = reshape(g, [b, s, o])        y = relu(linear(x, W))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardcomp.ir.layout import Size, same
from shardcomp.ir.nodes import value
from shardcomp.ir.operators import operator_of
from shardcomp.ir.program import Context, Contract, Program, Value
from shardcomp.sharding.leading_dims import LeadingSizes, row_operands, unmerge
from shardcomp.torch_private import tree_map_only

CONTRACT = Contract(requires=frozenset({"canonical"}), provides=frozenset({"unmerged"}))

aten = torch.ops.aten


def run(program: Program, context: Context) -> Program:
    [unit] = program.units
    body = unit.body.copy()
    _Unflattening(body.graph)
    return replace(program, units=[replace(unit, body=body)])


class _Unflattening:
    """Rewrites a graph: finds the merged values, makes the twins that are worth it, and drops what they replace."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.leads: dict[fx.Node, LeadingSizes] = {}
        self.twins: dict[fx.Node, fx.Node] = {}
        self.split_operands: dict[tuple[fx.Node, LeadingSizes], fx.Node] = {}
        calls = [node for node in graph.nodes if node.op == "call_function"]
        for node in calls:
            if (lead := self._lead(node)) is not None:
                self.leads[node] = lead
        # Only what leads to a reshape that undoes the merge is worth a twin.
        ends = {node for node in calls if self._splits_merged_dim(node)}
        merged = self._merged_values(ends)
        for node in calls:
            if node in merged:
                self.twins[node] = self._twin(node)
        # From the last to the first, so that what is replaced is used by nothing that goes as well.
        for node in reversed(calls):
            if node.users and (node in ends or node in merged and not self._is_merge(node)):
                twin = self.twins[node.args[0] if node in ends else node]  # type: ignore[index]
                node.replace_all_uses_with(self._reshaped(twin, value(node).shape, node))
            if not node.users:
                graph.erase_node(node)

    def _lead(self, node: fx.Node) -> LeadingSizes | None:
        """What dimension 0 of a call's result was merged from, if it was."""
        packet = operator_of(node)
        if packet is aten.reshape:
            return _merged(self._shape(node.args[0]), value(node).shape)
        if packet is aten.repeat:
            return _repeated(node)
        # Operands that were merged from different sizes say nothing about the result.
        leads = [self.leads[row] for row in row_operands(node) if row in self.leads]
        return leads[0] if leads and all(_alike(leads[0], other) for other in leads) else None

    def _shape(self, node: Any) -> tuple[Size, ...]:
        """The shape of a value, or of its twin."""
        shape = value(node).shape
        return (*self.leads[node], *shape[1:]) if node in self.leads else shape

    def _splits_merged_dim(self, node: fx.Node) -> bool:
        """Whether a call divides a dimension that was merged."""
        if operator_of(node) is not aten.reshape or node.args[0] not in self.leads:
            return False
        # [b·s, h] -> [b·s, n, d] keeps the merge, and [b·s, h] -> [b, s, h] undoes it.
        before, after = self.leads[node.args[0]], self.leads.get(node, ())  # type: ignore[index]
        return not _alike(before, after[: len(before)])

    def _is_merge(self, node: fx.Node) -> bool:
        return operator_of(node) is aten.reshape and node.args[0] not in self.leads

    def _merged_values(self, ends: set[fx.Node]) -> set[fx.Node]:
        """The merged values that `ends` are computed from."""
        merged: set[fx.Node] = set()
        pending = [node.args[0] for node in ends]
        while pending:
            node = pending.pop()
            # Back along the operands whose dimension 0 is the result's, up to the merge itself.
            if isinstance(node, fx.Node) and node in self.leads and node not in merged:
                merged.add(node)
                pending += [node.args[0]] if operator_of(node) is aten.reshape else row_operands(node)
        return merged

    def _twin(self, node: fx.Node) -> fx.Node:
        """The same call with its leading dimensions apart."""
        lead = self.leads[node]
        packet = operator_of(node)
        source: Any = node.args[0]
        if packet is aten.reshape:
            # The merge reads a value that was never merged. A reshape after it reads the twin.
            return self._reshaped(self.twins.get(source, source), self._shape(node), node)
        if packet is aten.repeat:
            # [k·b, …] by repetition is [k, b, …] by broadcasting.
            return self._call(aten.expand.default, (source, list(self._shape(node))), {}, node)
        unmerged = unmerge(node, lead)
        assert unmerged is not None
        twins = {row: self._row(row, lead) for row in unmerged.rows}
        args, kwargs = fx.map_arg((unmerged.args, dict(node.kwargs)), lambda n: twins.get(n, n))
        return self._call(unmerged.target, args, kwargs, node)

    def _row(self, node: fx.Node, lead: LeadingSizes) -> fx.Node:
        """An operand's twin; an operand that no merge made is split."""
        if node in self.leads:
            return self.twins[node]
        if (node, lead) not in self.split_operands:
            with self.graph.inserting_after(node):
                self.split_operands[node, lead] = self._reshape(node, (*lead, *value(node).shape[1:]), node)
        return self.split_operands[node, lead]

    def _reshaped(self, source: fx.Node, shape: tuple[Size, ...], like: fx.Node) -> fx.Node:
        """A value in another shape, computed before `like`."""
        with self.graph.inserting_before(like):
            return self._reshape(source, shape, like)

    def _reshape(self, source: fx.Node, shape: tuple[Size, ...], like: fx.Node) -> fx.Node:
        """A value in another shape; itself, or what it is a reshape of, where that has the shape."""
        # Step back through reshapes: what one of them reads may have the shape already.
        while not _alike(value(source).shape, shape):
            if operator_of(source) is not aten.reshape:
                reshaped = self.graph.call_function(aten.reshape.default, (source, list(shape)))
                reshaped.meta = {**like.meta, "value": replace(value(like), shape=shape)}
                return reshaped
            source = source.args[0]  # type: ignore[assignment]
        return source

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node) -> fx.Node:
        lead = self.leads[node]
        with self.graph.inserting_before(node):
            twin = self.graph.call_function(target, args, kwargs)
        split_values = tree_map_only(
            Value, lambda tensor: replace(tensor, shape=(*lead, *tensor.shape[1:])), node.meta["value"]
        )
        twin.meta = {**node.meta, "value": split_values}
        return twin


def _alike(left: Iterable[Size], right: Iterable[Size]) -> bool:
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def _merged(source: tuple[Size, ...], target: tuple[Size, ...]) -> LeadingSizes | None:
    """The leading sizes of `source`, two or more, whose product is the first of `target`."""
    product: Size = 1
    lead: list[Size] = []
    for size in source if target else ():
        # Enough sizes: their product is the merged dimension. Dimensions of one are no factors and are left out.
        if same(product, target[0]):
            break
        product *= size
        lead += [] if same(size, 1) else [size]
    return tuple(lead) if len(lead) > 1 and same(product, target[0]) else None


def _repeated(node: fx.Node) -> LeadingSizes | None:
    """What a repetition only along dimension 0 makes: all of the operand again and again."""
    source, (times, *others) = value(node.args[0]).shape, node.args[1]  # type: ignore[arg-type,misc]
    if len(source) != len(others) + 1 or not all(same(other, 1) for other in others):
        return None
    return None if same(times, 1) or same(source[0], 1) else (times, source[0])
