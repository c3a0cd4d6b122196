"""Cross entropy per token, and its split form over a divided vocabulary: a few numbers per token are exchanged, never
logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.collectives import Axis
from shardcomp.layout import Size
from shardcomp.program import value
from shardcomp.rules import Form, register


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """-log softmax(logits)[label] for each token, zero where the label is `ignore_index`.

    logits: [t, v] floating. labels: [t] int64. Result: [t] in the dtype of the logits.
    """
    return functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def vocab_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, columns: int, axis: Axis) -> Tensor:
    """The same where each rank holds some columns of the logits: [t, local v], as `torch.chunk` leaves them of `columns`.

    One all-gather of three numbers per token (the largest local logit, the local sum of exponentials, the label's logit) gives
    every rank the whole result; the gradient needs no exchange. Result: [t], whole.
    """
    return _VocabCrossEntropy.apply(logits, labels, ignore_index, columns, axis)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, columns: int, axis: Axis) -> Tensor:
        counted = labels != ignore_index
        local = labels - axis.rank * -(-columns // axis.size)
        inside = counted & (local >= 0) & (local < logits.shape[1])
        column = torch.where(inside, local, 0).unsqueeze(1)
        largest = logits.amax(1)
        total = (logits - largest.unsqueeze(1)).exp_().sum(1)
        chosen = torch.where(inside, logits.gather(1, column).squeeze(1), 0)
        every = axis.all_gather(torch.stack((largest, total, chosen)).unsqueeze(0), 0)
        largest, total = _combine(every[:, 0], every[:, 1])
        normaliser = largest + total.log()
        ctx.save_for_backward(logits, normaliser, column, inside, counted)
        return torch.where(counted, normaliser - every[:, 2].sum(0), 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, normaliser, column, inside, counted = ctx.saved_tensors
        scale = torch.where(counted, gradients[0], 0).unsqueeze(1)
        gradient = (logits - normaliser.unsqueeze(1)).exp_().mul_(scale)
        gradient.scatter_add_(1, column, -scale * inside.unsqueeze(1).to(scale.dtype))
        return gradient, None, None, None, None


def _combine(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exponentials, each relative to its own largest logit, relative to the largest of all: [n, t] -> [t]."""
    top = largest.amax(0)
    return top, (total * (largest - top).exp()).sum(0)


def _exchanges(node: fx.Node) -> list[tuple[str, str, tuple[Size, ...], torch.dtype]]:
    logits = value(node.args[0])  # type: ignore[arg-type]
    return [("all_gather", "forward", (1, 3, logits.shape[0]), logits.dtype)]


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return *node.args, value(node.args[0]).shape[1]  # type: ignore[arg-type]


register(cross_entropy, "t v, t -> t", {"v": Form(vocab_cross_entropy, _arguments, exchanges=_exchanges)})
