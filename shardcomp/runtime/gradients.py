"""Gradients over the axes of the mesh: the once-per-step sum of those that come out partial, the global norm, and whether they
are finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.collectives import Axis
from shardcomp.kernels.grad_norm import grad_norm


@dataclass(frozen=True)
class Partial:
    """A parameter of whose gradient each rank of some axes holds one summand, and so does each of its copies on this rank."""

    copies: tuple[nn.Parameter, ...]
    axes: tuple[Axis, ...]


class PartialGradients:
    """Parameters whose gradient is to be summed once per step, such as a norm's weight under sequence parallelism, or a tied
    weight that two stages of a pipeline use.

    Only what a backward adds is summed, when all of the step's gradients are there: gradients that stood before were summed
    already, and summing them again would count them once per rank. Sums are made on `device`, wherever gradients are kept.
    """

    def __init__(self, partial: Iterable[Partial], device: torch.device) -> None:
        self._device = device
        self._partial = [p for p in partial if len(p.copies) > 1 or any(axis.size > 1 for axis in p.axes)]
        self._before: dict[nn.Parameter, Tensor | None] | None = None

    def set_aside(self) -> None:
        """Called before a backward: take the gradients that stand away."""
        if self._before is None:
            self._before = {p: p.grad for each in self._partial for p in each.copies}
            for p in self._before:
                p.grad = None

    def held(self) -> list[Tensor]:
        """The gradients that are set aside."""
        return [gradient for gradient in (self._before or {}).values() if gradient is not None]

    def forget(self) -> None:
        """Called when a step failed half way: what was set aside is not to be added to a later one."""
        self._before = None

    @torch.no_grad()
    def add_up(self) -> None:
        """Called when every gradient of the step is there: sum the new ones over their axes and put the old ones back."""
        if self._before is None:
            return
        before, self._before = self._before, None
        sums = {id(each): total for each in self._partial if (total := self._sum(each)) is not None}
        # In one order on all ranks of an axis: by name, axes of one name by their size.
        axes = {id(axis): axis for each in self._partial for axis in each.axes if axis.size > 1}
        for axis in sorted(axes.values(), key=lambda axis: (axis.name, axis.size)):
            over = [each for each in self._partial if id(each) in sums and any(a is axis for a in each.axes)]
            if over:
                flat = [sums[id(each)].flatten() for each in over]
                total = axis.all_reduce(torch.cat(flat))
                for each, piece in zip(over, total.split([f.numel() for f in flat]), strict=True):
                    sums[id(each)] = piece.view_as(sums[id(each)])
        for each in self._partial:
            for p in each.copies:
                if id(each) in sums and p.grad is not None:
                    local(p.grad).copy_(sums[id(each)])
        for p, old in before.items():
            if old is not None:
                p.grad = old if p.grad is None else p.grad + old

    def _sum(self, partial: Partial) -> Tensor | None:
        held = [local(p.grad).to(self._device) for p in partial.copies if p.grad is not None]
        return sum(held[1:], held[0]) if held else None


class _Began(torch.autograd.Function):
    """The first step of a backward: `began` gives the gradient that it starts from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, began: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.began = began
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.began(gradients[0]), None


def around_backward(x: Tensor, before: Callable[[], float], after: Callable[[], None]) -> Tensor:
    """`x`, such that its backward runs `before` first, starts from a gradient times what that returns, and runs `after` last,
    behind FSDP's own last callback."""

    def began(gradient: Tensor) -> Tensor:
        scale = before()
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        # FSDP queues its last callback after this point. A callback that queues another runs before it, the other after it.
        engine.queue_callback(lambda: engine.queue_callback(after))
        return gradient if scale == 1.0 else gradient * scale

    return _Began.apply(x, began)


@torch.no_grad()
def global_norm(
    parameters: Iterable[nn.Parameter],
    axes: Mapping[str, Axis],
    device: torch.device,
    master: torch.dtype = torch.float32,
    again: Collection[nn.Parameter] = (),
) -> Tensor:
    """The 2-norm of all gradients, the same on every rank: [] in `master`, on `device`.

    Each element of each gradient counts once: pieces are added over the axes that cut them, copies are not. master: the dtype
    of gradients. again: parameters that hold a gradient which another stage counts.
    """
    skipped = {id(p) for p in again}
    alike: dict[tuple[frozenset[str], torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) not in skipped:
            alike.setdefault((_cut_axes(parameter.grad), parameter.grad.device), []).append(local(parameter.grad))
    sums: dict[frozenset[str], Tensor] = {}
    for (cut, _), gradients in sorted(alike.items(), key=lambda entry: (sorted(entry[0][0]), str(entry[0][1]))):
        square = grad_norm(gradients).to(device, master)
        sums[cut] = sums[cut] + square if cut in sums else square
    for name, axis in axes.items():
        over = [cut for cut in sums if name in cut]
        if axis.size > 1 and over:
            totals = axis.all_reduce(torch.stack([sums[cut] for cut in over]))
            sums.update(zip(over, totals, strict=True))
    square = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), dtype=master, device=device)
    return axes["pp"].all_reduce(square).sqrt()


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float | Tensor) -> None:
    """Multiply every gradient that stands."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(local(parameter.grad))
    for device, gradients in by_device.items():
        if isinstance(factor, Tensor):
            torch._foreach_mul_(gradients, factor.to(device, gradients[0].dtype))
        elif factor != 1.0:
            torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def not_finite(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """1 where a gradient on this rank holds an infinity or something that is no number, else 0: float32 []."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), device=device)
    largest = torch._foreach_norm(gradients, float("inf"))
    return (~torch.stack([each.to(device) for each in largest]).isfinite()).any().float()


def _cut_axes(gradient: Tensor) -> frozenset[str]:
    if not isinstance(gradient, DTensor):
        return frozenset()
    names = gradient.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())


def local(gradient: Tensor) -> Tensor:
    """This rank's piece."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
