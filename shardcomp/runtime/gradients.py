"""Gradients over the axes of the mesh: the once-per-step sum of those that come out partial, and the global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.collectives import Axis


class PartialGradients:
    """Parameters on whose gradient each rank of an axis holds one summand, such as a norm's weight under sequence parallelism.

    What a backward adds is summed over the axis once, when all of the step's gradients are there. Only that increment:
    gradients that stood before were summed already, and summing them again would count them once per rank.
    """

    def __init__(self, parameters: Iterable[tuple[nn.Parameter, tuple[str, ...]]], axes: Mapping[str, Axis]) -> None:
        self._parameters = [(p, names) for p, names in parameters if any(axes[name].size > 1 for name in names)]
        self._axes = axes
        self._before: list[Tensor | None] | None = None

    def set_aside(self) -> None:
        """Called before a backward: take the gradients that stand away."""
        if self._before is not None:
            return
        self._before = [p.grad for p, _ in self._parameters]
        for p, _ in self._parameters:
            p.grad = None

    def forget(self) -> None:
        """Called when a step failed half way: what was set aside is not to be added to a later one."""
        self._before = None

    @torch.no_grad()
    def add_up(self) -> None:
        """Called when every gradient of the step is there: sum the new ones over their axes and put the old ones back."""
        if self._before is None:
            return
        before, self._before = self._before, None
        for name, axis in self._axes.items():
            new = [_local(p.grad) for p, names in self._parameters if name in names and p.grad is not None]
            if not new or axis.size == 1:
                continue
            total = axis.all_reduce(torch.cat([gradient.flatten() for gradient in new]))
            for gradient, piece in zip(new, total.split([g.numel() for g in new]), strict=True):
                gradient.copy_(piece.view_as(gradient))
        for (p, _), old in zip(self._parameters, before, strict=True):
            if old is not None:
                p.grad = old if p.grad is None else p.grad + old


class _Began(torch.autograd.Function):
    """The first step of a backward: the identity, which calls `began`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, began: Callable[[], None]) -> Tensor:
        ctx.began = began
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.began()
        return gradients[0], None


def around_backward(x: Tensor, before: Callable[[], None], after: Callable[[], None]) -> Tensor:
    """`x`, such that its backward runs `before` first and `after` last, behind FSDP's own last callback."""

    def began() -> None:
        before()
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        # FSDP queues its last callback after this point. A callback that queues another runs before it, the other after it.
        engine.queue_callback(lambda: engine.queue_callback(after))

    return _Began.apply(x, began)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, axes: Mapping[str, Axis]) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most `max_norm`; returns the norm before, the same on every rank.

    Each element of each gradient counts once: pieces are added over the axes that cut them, copies are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    squares: dict[frozenset[str], list[Tensor]] = {}
    for gradient in gradients:
        norm = torch.linalg.vector_norm(_local(gradient), dtype=_wide(gradient.dtype))
        squares.setdefault(_cut_axes(gradient), []).append(norm.square())
    sums = {cut: torch.stack(each).sum() for cut, each in sorted(squares.items(), key=lambda entry: sorted(entry[0]))}
    for name, axis in axes.items():
        over = [cut for cut in sums if name in cut]
        if axis.size > 1 and over:
            totals = axis.all_reduce(torch.stack([sums[cut] for cut in over]))
            sums.update(zip(over, totals, strict=True))
    norm = torch.stack(list(sums.values())).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([_local(gradient) for gradient in gradients], scale.to(gradients[0].dtype))
    return norm


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut_axes(gradient: Tensor) -> frozenset[str]:
    if not isinstance(gradient, DTensor):
        return frozenset()
    names = gradient.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())


def _local(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
