"""Cross entropy per token, and its split form over a sharded vocabulary.

The split form exchanges three numbers per token and no logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.nodes import value
from shardcomp.kernels.register import define, register, widened
from shardcomp.kernels.small_cases import Calls, Samples
from shardcomp.sharding.rules import Form

ops = torch.ops.shardcomp


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """-log softmax(logits)[label] for each token, zero where the label is `ignore_index`.

    The backward saves the logits in their own dtype and two numbers per token; the softmax is never stored.

    Args:
        logits: [t, v] floating.
        labels: [t] int64.
        ignore_index: the label of tokens without a loss.

    Returns:
        [t] in float32, or in float64 for float64 logits, which is also the dtype of computation.

    Raises:
        RuntimeError: shapes or dtypes do not fit together (by the compiled kernel).

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), -100)
        tensor([1.3863, 0.0000])
    """
    return _CrossEntropy.apply(logits, labels, ignore_index, 0, None)


def vocab_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, columns: int, axis: Axis) -> Tensor:
    """`cross_entropy` of logits whose columns are sharded over an axis.

    One all-gather of three numbers per token (the largest local logit, the local sum of exponentials, the label's logit) gives
    every rank the result. The gradient needs no communication.

    Args:
        logits: [t, local v], this rank's shard of `columns` columns as `torch.chunk` splits them.
        labels: [t] int64, replicated.
        ignore_index: the label of tokens without a loss.
        columns: the size of the whole vocabulary.
        axis: the axis of the mesh over which the columns are sharded.

    Returns:
        [t], replicated.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> single = SimpleNamespace(rank=0, size=1, all_gather=lambda x, dim: x)  # an axis of one rank
        >>> vocab_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), -100, 4, single)
        tensor([1.3863, 0.0000])
    """
    return _CrossEntropy.apply(logits, labels, ignore_index, first_column(columns, axis), axis)


def first_column(columns: int, axis: Axis) -> int:
    """The first column of this rank's shard, as `torch.chunk` splits them."""
    return axis.rank * -(-columns // axis.size)


def normaliser_and_losses(statistics: Tensor, counted: Tensor, axis: Axis | None) -> tuple[Tensor, Tensor]:
    """The normaliser of each token over all ranks, and its loss.

    Args:
        statistics: [3, t] of this rank's columns, from `cross_entropy_statistics`.
        counted: [t] bool, whether a token has a loss.
        axis: the axis of the mesh over which the columns are sharded; None: the columns are whole.

    Returns:
        The largest logit m and the sum of exp(logit - m), [2, t]; and the losses, [t], zero where not `counted`.
    """
    if axis is not None:
        ranks = axis.all_gather(statistics.unsqueeze(0), 0)
        largest = ranks[:, 0].amax(0)
        total = (ranks[:, 1] * (ranks[:, 0] - largest).exp()).sum(0)  # each sum rescaled to the common maximum
        statistics = torch.stack((largest, total, ranks[:, 2].sum(0)))  # one rank has the label, the others zero
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
        # `where`, since a gradient that is not finite times zero would be NaN.
        scale = torch.where(counted, gradients[0], 0)
        return ops.cross_entropy_gradient(logits, labels, counted, normaliser, scale, ctx.first), None, None, None, None


def _statistics(logits: Tensor, labels: Tensor, counted: Tensor, first: int) -> Tensor:
    """[3, t]: the largest logit m, the sum of exp(logit - m), and the label's logit, zero if another rank has it."""
    wide = widened(logits)
    largest = wide.amax(1) if logits.shape[1] else wide.new_full(labels.shape, float("-inf"))
    # A row of -inf alone gives -inf - (-inf) = NaN in every column; its sum is zero, so that such a shard adds nothing.
    total = (wide - largest.unsqueeze(1)).exp_().sum(1).masked_fill_(largest == float("-inf"), 0)
    column, inside = _columns(logits, labels, counted, first)
    chosen = wide.gather(1, column.unsqueeze(1)).squeeze(1) if logits.shape[1] else total
    return torch.stack((largest, total, torch.where(inside, chosen, 0)))


def _gradient(logits: Tensor, labels: Tensor, counted: Tensor, normaliser: Tensor, scale: Tensor, first: int) -> Tensor:
    """(softmax(logits) - [label]) · scale, zero for the tokens that do not count, rounded once; contiguous."""
    column, inside = _columns(logits, labels, counted, first)
    largest, total = normaliser
    result = (widened(logits) - largest.unsqueeze(1)).exp_().div_(total.unsqueeze(1))
    if logits.shape[1]:
        result.scatter_add_(1, column.unsqueeze(1), -inside.to(result.dtype).unsqueeze(1))
    result = result.mul_(scale.to(result.dtype).unsqueeze(1)).masked_fill_(~counted.unsqueeze(1), 0)
    return result.to(logits.dtype).contiguous()


def _columns(logits: Tensor, labels: Tensor, counted: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The local column of each label, and whether this rank has it and the token counts."""
    column = labels - first
    # Labels that another rank has get column 0 below: an index must be valid even where its value is masked.
    inside = counted & (column >= 0) & (column < logits.shape[1])
    return torch.where(inside, column, 0), inside


def _gradient_in_place(logits: Tensor, *operands: Any) -> None:
    logits.copy_(_gradient(logits, *operands))


define(
    "cross_entropy_statistics(Tensor logits, Tensor labels, Tensor counted, int first) -> Tensor",
    _statistics,
    lambda logits, *_: logits.new_empty((3, logits.shape[0]), dtype=torch.promote_types(logits.dtype, torch.float32)),
)
_OPERANDS = "Tensor labels, Tensor counted, Tensor normaliser, Tensor scale, int first"
define(
    f"cross_entropy_gradient(Tensor logits, {_OPERANDS}) -> Tensor",
    _gradient,
    lambda logits, *_: logits.new_empty(logits.shape),
)
define(f"cross_entropy_gradient_(Tensor(a!) logits, {_OPERANDS}) -> ()", _gradient_in_place, lambda *_: None)


def _exchanges(node: fx.Node) -> list[tuple[str, str, tuple[Size, ...], torch.dtype]]:
    logits = value(node.args[0])  # type: ignore[arg-type]
    return [("all_gather", "forward", (1, 3, logits.shape[0]), torch.promote_types(logits.dtype, torch.float32))]


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return *node.args, value(node.args[0]).shape[1]  # type: ignore[arg-type]


def small_case(samples: Samples) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of small calls of `cross_entropy_statistics` and of `cross_entropy_gradient`."""
    logits, width = samples.rows()[0], samples.width
    # One label is ignored. The first column has label 2, as on a later rank of a split vocabulary.
    labels = torch.tensor([3, 8, -100, 4, 2])
    counted = labels >= 0
    normaliser = torch.stack((logits.float().amax(1), samples.uniform(5) + width))
    return (logits, labels, counted, 2), (logits, labels, counted, normaliser, samples.uniform(5), 2)


def _cases(samples: Samples) -> Calls:
    statistics, gradient = small_case(samples)
    return {"cross_entropy_statistics": statistics, "cross_entropy_gradient": gradient}


_FORMS = {"v": Form(vocab_cross_entropy, _arguments, exchanges=_exchanges)}
register(cross_entropy, "loss", rule="t v, t -> t", forms=_FORMS, kernel="cross_entropy", cases=_cases)
register(vocab_cross_entropy, "loss", kernel="cross_entropy")
