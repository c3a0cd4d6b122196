"""The last product and its cross entropy together: the logits are made in pieces, of some tokens each, and never kept.

`early`: the forward computes the gradients as well, as soon as it has a piece, and the backward multiplies them by the gradient
of the loss. It takes three products, as many as without this operator, but the gradients stand from the forward to the
backward. Else the backward makes the logits again, a fourth product, and nothing stands but a few numbers per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.collectives import Axis
from shardcomp.ir.layout import Size
from shardcomp.ir.program import value
from shardcomp.kernels.cross_entropy import first_column, normaliser_and_losses
from shardcomp.kernels.wide_matmul import add_product
from shardcomp.sharding.rules import Form, register

ops = torch.ops.shardcomp
Step = tuple[str, Any]
"""("mul", number), ("div", number), ("tanh", None) or ("to", dtype): what is done to logits before their loss is taken. A cast
makes a dtype no narrower."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    count: Tensor | int,
    bias: Tensor | None = None,
    *,
    ignore_index: int,
    chunks: int = 1,
    early: bool = True,
    steps: tuple[Step, ...] = (),
) -> Tensor:
    """The sum over tokens of `cross_entropy(steps(linear(x, weight, bias)), labels, ignore_index)`, divided by `count`.

    x: [.., h] floating, in which t tokens lie in order. weight: [v, h], bias: [v], in its dtype. labels: [t] int64. count:
    integer or floating, [], needs no gradient. chunks: the number of pieces. steps: done one after the other, each rounded to
    the dtype that it has. Result: [] in float32, or float64 for float64. The pieces' gradients of the weight are added up
    before they are rounded. Gradients are rounded when they are divided by `count`; where the gradient of the loss is no
    power of two, `early` rounds them once more.
    """
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
    """The same where each rank holds some rows of the weight: [local v, h], as `torch.chunk` leaves them of `columns`.

    Three numbers per token are exchanged, in one message for each piece where `early` needs gradients, else in one for all. The
    gradient of `x` is a summand of the whole one. Result: [], whole.
    """
    return _apply(x, weight, labels, count, bias, ignore_index, chunks, early, steps, first_column(columns, axis), axis)


@dataclass(frozen=True)
class _Job:
    """What does not change from piece to piece. wanted: whether x, weight and bias need a gradient."""

    ignore_index: int
    chunks: int
    early: bool
    steps: tuple[Step, ...]
    first: int
    axis: Axis | None
    wanted: tuple[bool, bool, bool]

    def pieces(self, tokens: int) -> Iterator[slice]:
        """Pieces of equal size, but for one token; at least one, which may be empty."""
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
    wanted = [torch.is_grad_enabled() and held is not None and held.requires_grad for held in (x, weight, bias)]
    job = _Job(ignore_index, chunks, early and any(wanted), steps, first, axis, tuple(wanted))  # type: ignore[arg-type]
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, bias, labels, count, job)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | int, job: _Job
    ) -> Tensor:
        counted = labels != job.ignore_index
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = counted.to(wide) / count
        gradients = _Gradients(x, weight, bias, job)
        losses, statistics = [], []
        for rows in job.pieces(x.shape[0]):
            logits = _Logits(x[rows], weight, bias, job.steps)
            statistics.append(ops.cross_entropy_statistics(logits.made, labels[rows], counted[rows], job.first))
            if job.early:
                normaliser, some = normaliser_and_losses(statistics.pop(), counted[rows], job.axis)
                losses.append(some)
                gradients.add(rows, logits, labels[rows], counted[rows], normaliser, scale[rows])
        if not job.early:
            normaliser, some = normaliser_and_losses(torch.cat(statistics, 1), counted, job.axis)
            losses.append(some)
        ctx.job = job
        if job.early:
            ctx.save_for_backward(*gradients.done())
        elif any(job.wanted):
            ctx.save_for_backward(x, weight, bias, labels, counted, normaliser, scale)
        return torch.cat(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        job, [given], held = ctx.job, gradients, ctx.saved_tensors
        if job.early:
            if not _is_one(given):
                held = tuple(None if each is None else each * given for each in held)
            return *held, None, None, None
        x, weight, bias, labels, counted, normaliser, scale = held
        found, scale = _Gradients(x, weight, bias, job), scale * given
        for rows in job.pieces(x.shape[0]):
            logits = _Logits(x[rows], weight, bias, job.steps)
            found.add(rows, logits, labels[rows], counted[rows], normaliser[:, rows], scale[rows])
        return *found.done(), None, None, None


def _is_one(gradient: Tensor) -> bool:
    """Whether the gradient of a loss is known to be 1 without waiting for a device: then those that stand need no copy."""
    return gradient.device.type == "cpu" and not torch.compiler.is_compiling() and bool(gradient == 1)


class _Logits:
    """The logits of some tokens, after the steps, and what the gradient needs of these."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, steps: tuple[Step, ...]) -> None:
        self.made = functional.linear(x, weight, bias)
        self.steps: list[tuple[str, Any]] = []
        for name, number in steps:
            before = self.made
            if name == "mul":
                self.made = before * number
            elif name == "div":
                self.made = before / number
            elif name == "tanh":
                self.made = before.tanh()
                number = self.made
            else:
                self.made = before.to(torch.promote_types(before.dtype, number))
                number = before.dtype
            self.steps.append((name, number))

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the product, given that of the last step's result."""
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
    """The gradients of x, weight and bias, summed over pieces; None for those that are not wanted.

    Two ways to come to the weight's gradient without rounding what pieces give: a sum in the wide dtype, or the logits'
    gradients of all pieces, from which one product makes it. Whichever takes less memory.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> None:
        self.x, self.weight, self.job = x, weight, job
        wide = torch.promote_types(x.dtype, torch.float32)
        of_x, of_weight, of_bias = job.wanted
        joined = of_weight and x.dtype != wide and x.shape[0] * x.itemsize <= x.shape[1] * wide.itemsize
        self.of_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if of_x else None
        self.of_logits = x.new_empty(x.shape[0], weight.shape[0]) if joined else None
        self.of_weight = torch.zeros_like(weight, dtype=wide) if of_weight and not joined else None
        self.of_bias = torch.zeros_like(bias, dtype=wide) if of_bias else None

    def add(self, rows: slice, logits: _Logits, labels: Tensor, counted: Tensor, normaliser: Tensor, scale: Tensor) -> None:
        """Add what a piece gives. Its logits are overwritten."""
        ops.cross_entropy_gradient_(logits.made, labels, counted, normaliser, scale, self.job.first)
        gradient = logits.back(logits.made)
        if self.of_x is not None:
            torch.mm(gradient, self.weight, out=self.of_x[rows])
        if self.of_logits is not None:
            self.of_logits[rows] = gradient
        if self.of_weight is not None:
            add_product(self.of_weight, gradient.mT, self.x[rows])
        if self.of_bias is not None:
            self.of_bias += gradient.sum(0, dtype=self.of_bias.dtype)

    def done(self) -> tuple[Tensor | None, ...]:
        of_weight = self.of_weight if self.of_logits is None else self.of_logits.mT @ self.x
        return tuple(None if each is None else each.to(self.x.dtype) for each in (self.of_x, of_weight, self.of_bias))


def is_early(call: fx.Node) -> bool:
    """Whether a call, whole or of the split form, computes its gradients in the forward."""
    return bool(call.args[7] if call.target is vocab_linear_cross_entropy else call.kwargs.get("early", True))


def _exchanges(node: fx.Node) -> list[tuple[str, str, tuple[Size, ...], torch.dtype]]:
    x, weight = value(node.args[0]), value(node.args[1])  # type: ignore[arg-type]
    pieces = int(node.args[6]) if is_early(node) and (x.requires_grad or weight.requires_grad) else 1  # type: ignore[arg-type]
    wide = torch.promote_types(x.dtype, torch.float32)
    return [("all_gather", "forward", (1, 3, value(node.args[2]).shape[0] / pieces), wide)] * pieces


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    bias = node.args[4] if len(node.args) > 4 else None
    given = {"chunks": 1, "early": True, "steps": (), **node.kwargs}
    settings = (given[name] for name in ("ignore_index", "chunks", "early", "steps"))
    return *node.args[:4], bias, *settings, value(node.args[1]).shape[0]  # type: ignore[arg-type]


register(
    linear_cross_entropy,
    "... h, v h, t!, , v -> ",
    {"v": Form(vocab_linear_cross_entropy, _arguments, exchanges=_exchanges)},
)
