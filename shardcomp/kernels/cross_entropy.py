"""Cross entropy per token, and its split form over a divided vocabulary: a few numbers per token are exchanged, never
logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.program import value
from shardcomp.kernels.register import define, widened
from shardcomp.sharding.rules import Form, register

ops = torch.ops.shardcomp


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """-log softmax(logits)[label] for each token, zero where the label is `ignore_index`.

    logits: [t, v] floating. labels: [t] int64. Result: [t] in float32, or float64 for such logits; all of it is computed in
    that dtype. The backward keeps the logits as they are, and two numbers per token.
    """
    return _CrossEntropy.apply(logits, labels, ignore_index, 0, None)


def vocab_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, columns: int, axis: Axis) -> Tensor:
    """The same where each rank holds some columns of the logits: [t, local v], as `torch.chunk` leaves them of `columns`.

    One all-gather of three numbers per token (the largest local logit, the local sum of exponentials, the label's logit) gives
    every rank the whole result; the gradient needs no exchange. Result: [t], whole.
    """
    return _CrossEntropy.apply(logits, labels, ignore_index, first_column(columns, axis), axis)


def first_column(columns: int, axis: Axis) -> int:
    """The first of the columns that a rank holds, as `torch.chunk` leaves them."""
    return axis.rank * -(-columns // axis.size)


def normaliser_and_losses(statistics: Tensor, counted: Tensor, axis: Axis | None) -> tuple[Tensor, Tensor]:
    """The largest logit of each token and the sum of the exponentials of what all are below it, [2, t]; and the losses, [t],
    zero where not `counted`.

    statistics: [3, t], of the columns that this rank holds, as `cross_entropy_statistics` gives them.
    """
    if axis is not None:
        every = axis.all_gather(statistics.unsqueeze(0), 0)
        largest = every[:, 0].amax(0)
        total = (every[:, 1] * (every[:, 0] - largest).exp()).sum(0)
        statistics = torch.stack((largest, total, every[:, 2].sum(0)))
    largest, total, chosen = statistics
    return statistics[:2], torch.where(counted, total.log() - (chosen - largest), 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, first: int, axis: Axis | None) -> Tensor:
        counted = labels != ignore_index
        statistics = ops.cross_entropy_statistics(logits, labels, counted, first)
        normaliser, losses = normaliser_and_losses(statistics, counted, axis)
        ctx.first = first
        ctx.save_for_backward(logits, labels, counted, normaliser)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels, counted, normaliser = ctx.saved_tensors
        scale = torch.where(counted, gradients[0], 0)
        return ops.cross_entropy_gradient(logits, labels, counted, normaliser, scale, ctx.first), None, None, None, None


def _statistics(logits: Tensor, labels: Tensor, counted: Tensor, first: int) -> Tensor:
    """Per token: the largest of the logits, the sum of the exponentials of what they are below it, and the label's logit."""
    wide = widened(logits)
    largest = wide.amax(1) if logits.shape[1] else wide.new_full(labels.shape, float("-inf"))
    total = (wide - largest.unsqueeze(1)).exp_().sum(1).masked_fill_(largest == float("-inf"), 0)
    column, inside = _columns(logits, labels, counted, first)
    chosen = wide.gather(1, column.unsqueeze(1)).squeeze(1) if logits.shape[1] else total
    return torch.stack((largest, total, torch.where(inside, chosen, 0)))


def _gradient(logits: Tensor, labels: Tensor, counted: Tensor, normaliser: Tensor, scale: Tensor, first: int) -> Tensor:
    """(softmax(logits) - [label]) · scale, zero for the tokens that do not count, rounded once; contiguous."""
    column, inside = _columns(logits, labels, counted, first)
    largest, total = normaliser
    made = (widened(logits) - largest.unsqueeze(1)).exp_().div_(total.unsqueeze(1))
    if logits.shape[1]:
        made.scatter_add_(1, column.unsqueeze(1), -inside.to(made.dtype).unsqueeze(1))
    return made.mul_(scale.to(made.dtype).unsqueeze(1)).masked_fill_(~counted.unsqueeze(1), 0).to(logits.dtype).contiguous()


def _columns(logits: Tensor, labels: Tensor, counted: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The column of each label, and whether it is here."""
    column = labels - first
    inside = counted & (column >= 0) & (column < logits.shape[1])
    return torch.where(inside, column, 0), inside


def _gradient_over(*given: Any) -> None:
    given[0].copy_(_gradient(*given))


define(
    "cross_entropy_statistics(Tensor logits, Tensor labels, Tensor counted, int first) -> Tensor",
    _statistics,
    lambda logits, *_: logits.new_empty((3, logits.shape[0]), dtype=torch.promote_types(logits.dtype, torch.float32)),
)
_GIVEN = "Tensor labels, Tensor counted, Tensor normaliser, Tensor scale, int first"
define(
    f"cross_entropy_gradient(Tensor logits, {_GIVEN}) -> Tensor", _gradient, lambda logits, *_: logits.new_empty(logits.shape)
)
define(f"cross_entropy_gradient_(Tensor(a!) logits, {_GIVEN}) -> ()", _gradient_over, lambda *_: None)


def _exchanges(node: fx.Node) -> list[tuple[str, str, tuple[Size, ...], torch.dtype]]:
    logits = value(node.args[0])  # type: ignore[arg-type]
    return [("all_gather", "forward", (1, 3, logits.shape[0]), torch.promote_types(logits.dtype, torch.float32))]


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return *node.args, value(node.args[0]).shape[1]  # type: ignore[arg-type]


register(cross_entropy, "t v, t -> t", {"v": Form(vocab_cross_entropy, _arguments, exchanges=_exchanges)})
