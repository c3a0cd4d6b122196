"""What a call returns: DTensors where tensor parallelism splits an output, else plain tensors with the same methods."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardcomp.errors import BatchError
from shardcomp.ir.collectives import Axis
from shardcomp.kernels.cross_entropy import cross_entropy, vocab_cross_entropy
from shardcomp.torch_private import assert_async, disabled_torch_function


class WholeTensor(Tensor):
    """A plain tensor with `full_tensor` and `to_local`, so that a loss of the user's own runs under every plan. Whatever is
    computed from it is a plain tensor."""

    __torch_function__ = disabled_torch_function

    def full_tensor(self) -> Tensor:
        """The tensor itself."""
        return self

    def to_local(self) -> Tensor:
        """The tensor itself."""
        return self


class _Plain(torch.autograd.Function):
    """The identity, and no view, whose gradient is plain: a gradient that comes from arithmetic with DTensors is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [gradient] = gradients
        return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


class _Unchanged(torch.autograd.Function):
    """The identity on `x`, computed from `logits`, whose backward raises where the logits were written into since.

    Autograd does not see that: computing saves the local tensor, and writing changes the version of the DTensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.saved_tensors  # torch compares versions here  # noqa: B018
        return gradients[0], None


def computed_of(x: Tensor, logits: Tensor | None) -> Tensor:
    """A plain tensor computed from logits, for the caller's own arithmetic, with the checks of `_Plain` and `_Unchanged`."""
    if isinstance(logits, DTensor) and x.requires_grad:
        x = _Unchanged.apply(x, logits)
    return _Plain.apply(x)


def as_output(local: Tensor, mesh: DeviceMesh, split: tuple[int, int] | None, whole: bool) -> Tensor:
    """An output as the caller sees it.

    local: this rank's shard. split: (dim that tp splits, global size), or None for a replicated output. whole: whether to
    gather a split one. Its gradient must then be the same on every rank of tp.
    """
    if split is None:
        return local.as_subclass(WholeTensor)
    dim, size = split
    shape = torch.Size([*local.shape[:dim], size, *local.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    logits = DTensor.from_local(local, mesh["tp"], [Shard(dim)], run_check=False, shape=shape, stride=stride)
    return _Plain.apply(logits.full_tensor()).as_subclass(WholeTensor) if whole else logits


def token_log_probs(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """The log-probability of each label, for a loss of your own.

    Logits that tensor parallelism splits stay split: ranks exchange three numbers per token. Labels are not shifted: the label
    of a position is what its logits predict.

    Args:
        logits: [b, s, v] floating, from a call of a sharded model or any other.
        labels: [b, s] int64, the same on every rank of tp.
        ignored: the label that does not count.

    Returns:
        [b, s], in float32, or float64 for such logits: log softmax(logits)[label], zero where the label is `ignored`. The same
        on every rank of tp.

    Raises:
        BatchError: for a label outside of the vocabulary, on a CPU. On an accelerator the device asserts it.

    Example:
        >>> log_probs = shardcomp.token_log_probs(sharded(input_ids=ids).logits[:, :-1], ids[:, 1:])
        >>> log_probs.shape == ids[:, 1:].shape
        True
    """
    columns, flat = logits.shape[-1], labels.flatten()
    inside = ((flat >= 0) & (flat < columns) | (flat == ignored)).all()
    if flat.device.type != "cpu":
        assert_async(inside)
    elif not inside:
        wrong = flat[(flat != ignored) & ((flat < 0) | (flat >= columns))]
        raise BatchError(f"token_log_probs: a label is {int(wrong[0])}; the logits have the columns 0 to {columns - 1}")
    if not isinstance(logits, DTensor):
        losses = cross_entropy(logits.flatten(0, -2), flat, ignored)
    else:
        mesh, [placement] = logits.device_mesh, logits.placements
        if not placement.is_shard(logits.dim() - 1):
            return token_log_probs(logits.full_tensor(), labels, ignored)
        axis = Axis("tp", mesh.size(), mesh.get_local_rank(), mesh.get_group())
        losses = vocab_cross_entropy(logits.to_local().flatten(0, -2), flat, ignored, columns, axis)
    return computed_of(-losses.view(labels.shape), logits)


def output_type(name: str) -> Callable[..., Any]:
    """The class of a model's result, from "module:class"."""
    module, _, attribute = name.partition(":")
    kind: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return kind
