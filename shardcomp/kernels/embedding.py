"""The split form of an embedding whose rows, the vocabulary, are sharded over an axis of the mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.collectives import Axis
from shardcomp.ir.nodes import value
from shardcomp.kernels.register import register
from shardcomp.sharding.notation import parse
from shardcomp.sharding.rules import Factoring, Form, apply


def vocab_embedding(weight: Tensor, ids: Tensor, padding: int, rows: int, axis: Axis) -> Tensor:
    """Look up the ids that are among this rank's rows. Other ids give zero, so that the ranks' results sum to the embedding.

    Args:
        weight: [local rows, h], this rank's shard of `rows` rows as `torch.chunk` splits them.
        ids: [..] int64.
        padding: the row that gets no gradient, or -1.
        rows: the size of the whole vocabulary.
        axis: the axis of the mesh over which the rows are sharded.

    Returns:
        [.., h], partial.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> second = SimpleNamespace(rank=1, size=2)  # has rows 2 and 3 of 4
        >>> vocab_embedding(torch.tensor([[20.0], [30.0]]), torch.tensor([0, 3]), -1, 4, second)
        tensor([[ 0.],
                [30.]])
    """
    first = axis.rank * -(-rows // axis.size)
    local = ids - first
    inside = (local >= 0) & (local < weight.shape[0])
    # The padding row exists on one rank alone.
    here = padding - first if 0 <= padding - first < weight.shape[0] else None
    rows_of_ids = functional.embedding(torch.where(inside, local, 0), weight, padding_idx=here)
    # Foreign ids looked up row 0; the factor zeroes both that value and its gradient.
    return rows_of_ids * inside.unsqueeze(-1).to(rows_of_ids.dtype)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    weight, ids, *rest = node.args
    padding = rest[0] if rest else node.kwargs.get("padding_idx", -1)
    return weight, ids, padding, value(weight).shape[0]  # type: ignore[arg-type]


def scales_by_frequency(node: fx.Node) -> bool:
    """Whether an embedding divides the gradient of each row by the number of times that the row is looked up."""
    return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("scale_grad_by_freq"))


_LINE = parse("v h, ... -> ... h")
_FORMS = {"v": Form(vocab_embedding, _arguments, partial=True)}


def _rule(node: fx.Node) -> Factoring | None:
    """The line above. An embedding that scales by frequency needs all ids, so these stay whole on every rank.

    The pass tensor_parallel refuses to split its rows.
    """
    factoring = apply(_LINE, node, _FORMS)
    if factoring is None or not scales_by_frequency(node):
        return factoring
    weight, ids = factoring.operands
    unsplit = (None,) * len(ids)
    return replace(factoring, operands=(weight, unsplit), results=((*unsplit, weight[1]),))


register(vocab_embedding, "lookup", splits=torch.ops.aten.embedding, rule=_rule, backward="indices")
