"""The last linear layer and its cross entropy together: the logits are computed chunk by chunk of tokens and never stored.

`early`: the forward also computes the gradients of each chunk, while it has the logits, and the backward multiplies them by the
gradient of the loss. This takes three matrix products, as without this operator, but the gradients stay in memory between
forward and backward. Not early: the backward recomputes the logits, a fourth product, and only a few numbers per token stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.nodes import value
from shardcomp.kernels.cross_entropy import first_column, normaliser_and_losses, small_case
from shardcomp.kernels.register import register
from shardcomp.kernels.small_cases import Calls, Samples
from shardcomp.kernels.wide_matmul import add_product, linear, matmul
from shardcomp.sharding.rules import Form

ops = torch.ops.shardcomp
Step = tuple[str, Any]
"""("mul", number), ("div", number), ("tanh", None) or ("to", dtype): an operation on the logits before their loss, such as a
soft cap. A cast never narrows the dtype."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    count: Tensor | int,
    bias: Tensor | None = None,
    *,
    ignore_index: int,
    chunks: int = 1,
    least_rows: int = 1,
    early: bool = True,
    steps: tuple[Step, ...] = (),
) -> Tensor:
    """The sum over tokens of `cross_entropy(steps(linear(x, weight, bias)), labels, ignore_index)`, divided by `count`.

    The gradient of the weight is summed over chunks in float32 and rounded once. With `early`, gradients are rounded before the
    backward multiplies them by the gradient of the loss, and once more by that product unless it is a power of two.

    Args:
        x: [.., h] floating; its leading dimensions are t tokens in order.
        weight: [v, h] in the dtype of `x`.
        labels: [t] int64.
        count: the divisor, a number or a tensor []; gets no gradient.
        bias: [v] in the dtype of `x`, or None.
        ignore_index: the label of tokens without a loss.
        chunks: the number of chunks of tokens; the logits of one chunk are in memory at a time.
        least_rows: no more chunks are made than have so many tokens each.
        early: compute the gradients in the forward.
        steps: operations on the logits, in order; each result is rounded to its dtype.

    Returns:
        [] in float32, or in float64 for float64.

    Example:
        >>> import torch
        >>> x, weight, labels = torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 2])
        >>> linear_cross_entropy(x, weight, labels, 2, ignore_index=-100, chunks=2)
        tensor(1.3863)
    """
    tokens = labels.shape[0]
    chunks = max(1, min(chunks, tokens // least_rows))
    return _apply(x, weight, labels, count, bias, ignore_index, chunks, early, steps, 0, None)


def vocab_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    count: Tensor | int,
    bias: Tensor | None,
    ignore_index: int,
    chunks: int,
    early: bool,
    steps: tuple[Step, ...],
    columns: int,
    axis: Axis,
) -> Tensor:
    """`linear_cross_entropy` with a weight whose rows, the vocabulary, are sharded over an axis.

    The ranks all-gather three numbers per token: once for each chunk where `early` needs gradients, else once for all. There
    are `chunks` chunks, however few tokens each has: the report says how many messages are sent. The gradient of `x` is
    partial.

    Args:
        x, labels, count, ignore_index, chunks, early, steps: as in `linear_cross_entropy`; replicated.
        weight: [local v, h], this rank's shard of `columns` rows as `torch.chunk` splits them.
        bias: [local v], or None.
        columns: the size of the whole vocabulary.
        axis: the axis of the mesh over which the rows are sharded.

    Returns:
        [], replicated.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> single = SimpleNamespace(rank=0, size=1, all_gather=lambda x, dim: x)  # an axis of one rank
        >>> x, weight, labels = torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, 2])
        >>> vocab_linear_cross_entropy(x, weight, labels, 2, None, -100, 1, True, (), 4, single)
        tensor(1.3863)
    """
    return _apply(x, weight, labels, count, bias, ignore_index, chunks, early, steps, first_column(columns, axis), axis)


@dataclass(frozen=True)
class _Job:
    """The settings of all chunks. needs_grad: whether x, weight and bias need a gradient."""

    ignore_index: int
    chunks: int
    early: bool
    steps: tuple[Step, ...]
    first: int
    axis: Axis | None
    needs_grad: tuple[bool, bool, bool]

    def token_slices(self, tokens: int) -> Iterator[slice]:
        """The chunks, whose sizes differ by at most one token; at least one chunk, which may be empty."""
        ends = [i * tokens // self.chunks for i in range(self.chunks + 1)]
        return (slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b or b == tokens == 0)


def _apply(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    count: Tensor | int,
    bias: Tensor | None,
    ignore_index: int,
    chunks: int,
    early: bool,
    steps: tuple[Step, ...],
    first: int,
    axis: Axis | None,
) -> Tensor:
    needs_grad = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    job = _Job(ignore_index, chunks, early and any(needs_grad), steps, first, axis, tuple(needs_grad))  # type: ignore[arg-type]
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, labels, count, job)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | int, job: _Job
    ) -> Tensor:
        counted = labels != job.ignore_index
        wide = torch.promote_types(x.dtype, torch.float32)
        # The gradient of each token's loss but for the gradient of the result, which only the backward knows.
        scale = counted.to(wide) / count
        gradients = _Gradients(x, weight, bias, job)
        losses, statistics = [], []
        for rows in job.token_slices(x.shape[0]):
            logits = _Logits(x[rows], weight, bias, job.steps)
            statistics.append(ops.cross_entropy_statistics(logits.values, labels[rows], counted[rows], job.first))
            if job.early:
                normaliser, chunk_losses = normaliser_and_losses(statistics.pop(), counted[rows], job.axis)
                losses.append(chunk_losses)
                gradients.add(rows, logits, labels[rows], counted[rows], normaliser, scale[rows])
        if not job.early:
            # One message for all chunks: without early gradients nothing needs the normaliser before the end.
            normaliser, all_losses = normaliser_and_losses(torch.cat(statistics, 1), counted, job.axis)
            losses.append(all_losses)
        ctx.job = job
        if job.early:
            ctx.save_for_backward(*gradients.results())
        elif any(job.needs_grad):
            ctx.save_for_backward(x, weight, bias, labels, counted, normaliser, scale)
        return torch.cat(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        job, [of_loss], saved = ctx.job, gradients, ctx.saved_tensors
        if job.early:
            # The saved gradients are those for a gradient of 1.
            if not _is_one(of_loss):
                saved = tuple(None if gradient is None else gradient * of_loss for gradient in saved)
            return *saved, None, None, None
        x, weight, bias, labels, counted, normaliser, scale = saved
        sums, scale = _Gradients(x, weight, bias, job), scale * of_loss
        for rows in job.token_slices(x.shape[0]):
            logits = _Logits(x[rows], weight, bias, job.steps)
            sums.add(rows, logits, labels[rows], counted[rows], normaliser[:, rows], scale[rows])
        return *sums.results(), None, None, None


def _is_one(gradient: Tensor) -> bool:
    """Whether the gradient of the loss is known to be 1 without waiting for a device; saved gradients then need no copy."""
    return gradient.device.type == "cpu" and not torch.compiler.is_compiling() and bool(gradient == 1)


class _Logits:
    """The logits of a chunk, after the steps, with the tensors that the gradient of each step needs."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Step, ...]) -> None:
        self.values = linear(x, weight, bias)
        self.steps: list[tuple[str, Any]] = []
        for name, number in steps:
            before = self.values
            if name == "mul":
                self.values = before * number
            elif name == "div":
                self.values = before / number
            elif name == "tanh":
                self.values = before.tanh()
                number = self.values
            else:
                self.values = before.to(torch.promote_types(before.dtype, number))
                number = before.dtype
            self.steps.append((name, number))

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the linear layer's result, from that of the last step's result."""
        for name, number in reversed(self.steps):
            if name == "mul":
                gradient = gradient * number
            elif name == "div":
                gradient = gradient / number
            elif name == "tanh":
                gradient = torch.ops.aten.tanh_backward(gradient, number)
            else:
                gradient = gradient.to(number)
        return gradient


class _Gradients:
    """The gradients of x, weight and bias, summed over chunks; None where none is needed.

    The weight's gradient must not be rounded for each chunk. There are two ways: a sum [v, h] in the wide dtype, or the
    gradients of all logits [t, v] in the narrow one, from which a single product makes it. The one with less memory is taken.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> None:
        self.x, self.weight, self.job = x, weight, job
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x, of_weight, of_bias = job.needs_grad
        # t · v narrow logit gradients against v · h wide sums: v cancels on both sides.
        joined = of_weight and x.dtype != wide and x.shape[0] * x.itemsize <= x.shape[1] * wide.itemsize
        self.of_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if of_x else None
        self.of_logits = x.new_empty(x.shape[0], weight.shape[0]) if joined else None
        self.of_weight = torch.zeros_like(weight, dtype=wide) if of_weight and not joined else None
        self.of_bias = torch.zeros_like(bias, dtype=wide) if of_bias else None

    def add(self, rows: slice, logits: _Logits, labels: Tensor, counted: Tensor, normaliser: Tensor, scale: Tensor) -> None:
        """Add the gradients of a chunk. Its logits are overwritten: they are the largest tensor here."""
        ops.cross_entropy_gradient_(logits.values, labels, counted, normaliser, scale, self.job.first)
        gradient = logits.back(logits.values)
        if self.of_x is not None:
            # Each chunk has its own rows of x, so nothing is added and `out` saves a copy.
            matmul(gradient, self.weight, out=self.of_x[rows])
        if self.of_logits is not None:
            # The logits of the next chunk would overwrite this gradient.
            self.of_logits[rows] = gradient
        if self.of_weight is not None:
            add_product(self.of_weight, gradient.mT, self.x[rows])
        if self.of_bias is not None:
            self.of_bias += gradient.sum(0, dtype=self.of_bias.dtype)

    def results(self) -> tuple[Tensor | None, ...]:
        of_weight = self.of_weight if self.of_logits is None else matmul(self.of_logits.mT, self.x)
        return tuple(None if tensor is None else tensor.to(self.x.dtype) for tensor in (self.of_x, of_weight, self.of_bias))


def is_early(call: fx.Node) -> bool:
    """Whether a call, of the operator or of its split form, computes its gradients in the forward."""
    return bool(call.args[7] if call.target is vocab_linear_cross_entropy else call.kwargs.get("early", True))


def _exchanges(node: fx.Node) -> list[tuple[str, str, tuple[Size, ...], torch.dtype]]:
    x, weight = value(node.args[0]), value(node.args[1])  # type: ignore[arg-type]
    wide = torch.promote_types(x.dtype, torch.float32)
    split_by_chunk = is_early(node) and (x.requires_grad or weight.requires_grad)
    messages = int(node.args[6]) if split_by_chunk else 1  # type: ignore[arg-type]
    return [("all_gather", "forward", (1, 3, value(node.args[2]).shape[0] / messages), wide)] * messages


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    bias = node.args[4] if len(node.args) > 4 else None
    options = {"chunks": 1, "early": True, "steps": (), **node.kwargs}
    settings = (options[name] for name in ("ignore_index", "chunks", "early", "steps"))
    return *node.args[:4], bias, *settings, value(node.args[1]).shape[0]  # type: ignore[arg-type]


def _cases(samples: Samples) -> Calls:
    statistics, gradient = small_case(samples)
    return {"cross_entropy_statistics": statistics, "cross_entropy_gradient_": gradient}


register(
    linear_cross_entropy,
    "loss",
    "makes_logits",
    rule="... h, v h, t!, , v -> ",
    forms={"v": Form(vocab_linear_cross_entropy, _arguments, exchanges=_exchanges)},
    kernel="linear_cross_entropy",
    cases=_cases,
)
register(vocab_linear_cross_entropy, "loss", "makes_logits", kernel="linear_cross_entropy")
