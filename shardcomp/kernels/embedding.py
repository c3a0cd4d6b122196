"""The split form of an embedding whose rows, the vocabulary, are divided over an axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.collectives import Axis
from shardcomp.ir.program import value
from shardcomp.sharding.rules import RULES, Factoring, Form, Rule, apply, parse


def vocab_embedding(weight: Tensor, ids: Tensor, padding: int, rows: int, axis: Axis) -> Tensor:
    """Look up the ids that fall into this rank's rows; the others give zero, so that the ranks' results sum to the embedding.

    weight: [local rows, h], rows as `torch.chunk` leaves them of `rows` in all. ids: [...] int64. `padding`: the row that
    takes no gradient, or -1. Result: [..., h], partial.
    """
    first = axis.rank * -(-rows // axis.size)
    local = ids - first
    inside = (local >= 0) & (local < weight.shape[0])
    here = padding - first if 0 <= padding - first < weight.shape[0] else None
    found = functional.embedding(torch.where(inside, local, 0), weight, padding_idx=here)
    return found * inside.unsqueeze(-1).to(found.dtype)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    weight, ids, *rest = node.args
    padding = rest[0] if rest else node.kwargs.get("padding_idx", -1)
    return weight, ids, padding, value(weight).shape[0]  # type: ignore[arg-type]


def scales_by_frequency(node: fx.Node) -> bool:
    """Whether the gradient of each row that an embedding looks up is divided by the number of times it is looked up."""
    return bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("scale_grad_by_freq"))


_LINE = parse("v h, ... -> ... h")
_FORMS = {"v": Form(vocab_embedding, _arguments, partial=True)}


def _rule(node: fx.Node) -> Factoring | None:
    """One line, but for an embedding that counts how often a row is looked up: it needs all ids. The `tensor` pass refuses to
    split its rows."""
    factoring = apply(_LINE, node, _FORMS)
    if factoring is None or not scales_by_frequency(node):
        return factoring
    weight, ids = factoring.operands
    whole = (None,) * len(ids)
    return replace(factoring, operands=(weight, whole), results=((*whole, weight[1]),))


RULES[torch.ops.aten.embedding] = Rule(function=_rule)
