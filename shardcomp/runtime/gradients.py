"""Gradients over the axes of the mesh: the sum of partial ones, the global norm, and whether they are finite."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.ir.collectives import Axis
from shardcomp.kernels.grad_norm import grad_norm
from shardcomp.torch_private import foreach_mul_, foreach_norm


@dataclass(frozen=True)
class Partial:
    """A parameter whose gradient is partial: every rank of `axes`, and every copy on this rank, has one summand of it."""

    name: str
    copies: tuple[nn.Parameter, ...]
    axes: tuple[Axis, ...]

    @property
    def is_summed(self) -> bool:
        """Whether there is anything to sum."""
        return len(self.copies) > 1 or any(axis.size > 1 for axis in self.axes)


@torch.no_grad()
def reduce_partial(partials: Iterable[Partial], device: torch.device) -> None:
    """Sum partial gradients, such as gradients of norm weights under sequence parallelism, or of a weight that two stages of a
    pipeline use. Called once per backward pass, after its last gradient.

    Gradients that stood before the pass must be stashed: they are summed already, and would count once per rank. device: where
    sums are computed, also of gradients on the host.
    """
    partials = list(partials)
    sums = {id(partial): total for partial in partials if (total := _sum_of_copies(partial, device)) is not None}
    # In one order on all ranks of an axis: by name, axes of one name by their size.
    axes = {id(axis): axis for partial in partials for axis in partial.axes if axis.size > 1}
    for axis in sorted(axes.values(), key=lambda axis: (axis.name, axis.size)):
        over = [partial for partial in partials if id(partial) in sums and any(a is axis for a in partial.axes)]
        if over:
            flat = [sums[id(partial)].flatten() for partial in over]
            total = axis.all_reduce(torch.cat(flat))
            for partial, slice_ in zip(over, total.split([f.numel() for f in flat]), strict=True):
                sums[id(partial)] = slice_.view_as(sums[id(partial)])
    for partial in partials:
        for p in partial.copies:
            if id(partial) in sums and p.grad is not None:
                local(p.grad).copy_(sums[id(partial)])


def _sum_of_copies(partial: Partial, device: torch.device) -> Tensor | None:
    gradients = [local(p.grad).to(device) for p in partial.copies if p.grad is not None]
    return sum(gradients[1:], gradients[0]) if gradients else None


@torch.no_grad()
def global_norm(
    parameters: Iterable[nn.Parameter],
    axes: Mapping[str, Axis],
    device: torch.device,
    master: torch.dtype = torch.float32,
    again: Collection[nn.Parameter] = (),
) -> Tensor:
    """The 2-norm of all gradients, the same on every rank: [] in `master`, on `device`.

    Each element of each gradient counts once: squares are summed over the axes that shard it, not over those that replicate it.
    master: the dtype of gradients. again: parameters whose gradient another stage counts.
    """
    skipped = {id(p) for p in again}
    alike: dict[tuple[frozenset[str], torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) not in skipped:
            alike.setdefault((_sharded_axes(parameter.grad), parameter.grad.device), []).append(local(parameter.grad))
    sums: dict[frozenset[str], Tensor] = {}
    for (sharded, _), gradients in sorted(alike.items(), key=lambda entry: (sorted(entry[0][0]), str(entry[0][1]))):
        square = grad_norm(gradients).to(device, master)
        sums[sharded] = sums[sharded] + square if sharded in sums else square
    for name, axis in axes.items():
        over = [sharded for sharded in sums if name in sharded]
        if axis.size > 1 and over:
            totals = axis.all_reduce(torch.stack([sums[sharded] for sharded in over]))
            sums.update(zip(over, totals, strict=True))
    square = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), dtype=master, device=device)
    return axes["pp"].all_reduce(square).sqrt()


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """The factor for gradients of this norm that makes it at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float | Tensor) -> None:
    """Multiply every existing gradient."""
    if not isinstance(factor, Tensor) and factor == 1.0:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(local(parameter.grad))
    for device, gradients in by_device.items():
        if isinstance(factor, Tensor):
            foreach_mul_(gradients, factor.to(device, gradients[0].dtype))
        else:
            foreach_mul_(gradients, factor)


@torch.no_grad()
def not_finite(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """1 where a gradient on this rank has an infinity or NaN, else 0: float32 []."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), device=device)
    on_cpu = [gradient for gradient in gradients if gradient.device.type == "cpu"]
    elsewhere = [gradient for gradient in gradients if gradient.device.type != "cpu"]
    # One kernel for all gradients of a GPU. A CPU has none such, and finds extremes several times as fast as a norm.
    extremes = [*(foreach_norm(elsewhere, float("inf")) if elsewhere else ())]
    extremes += [extreme for gradient in on_cpu for extreme in gradient.aminmax()]
    return (~torch.stack([extreme.isfinite().to(device) for extreme in extremes])).any().float()


def _sharded_axes(gradient: Tensor) -> frozenset[str]:
    if not isinstance(gradient, DTensor):
        return frozenset()
    names = gradient.device_mesh.mesh_dim_names or ()
    return frozenset(name for name, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())


def local(gradient: Tensor) -> Tensor:
    """This rank's shard."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
