"""A DTensor put together, also where FSDP has cut unevenly what tensor parallelism had cut before, which torch's own
`full_tensor` refuses."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.functional import pad

from shardcomp.ir.collectives import Axis


def full_tensor(held: Tensor) -> Tensor:
    """The whole tensor, on every rank of the mesh that `held` lies on, all of which call this together; `held` itself where it
    is no DTensor."""
    if not isinstance(held, DTensor):
        return held
    mesh = held.device_mesh
    # Cut from the outermost to the innermost axis, but last along those that are strided.
    cuts = [(isinstance(p, _StridedShard), axis, p.dim) for axis, p in enumerate(held.placements) if hasattr(p, "dim")]
    lengths = list(held.shape)
    steps: list[tuple[int, int, int]] = []
    for _, axis, dim in sorted(cuts):
        length, size, at = lengths[dim], mesh.size(axis), mesh.get_local_rank(axis)
        step = -(-length // size)
        steps.append((axis, dim, length))
        lengths[dim] = max(0, min(step, length - at * step))
    found = held.to_local().to(mesh.device_type)  # what the host keeps is sent from the device
    for axis, dim, length in reversed(steps):
        size = mesh.size(axis)
        if size == 1:
            continue
        missing = -(-length // size) - found.shape[dim]
        filled = pad(found, [0, 0] * (found.dim() - 1 - dim) + [0, missing]) if missing else found
        group = Axis(str(axis), size, mesh.get_local_rank(axis), mesh.get_group(axis))
        found = group.all_gather(filled, dim).narrow(dim, 0, length)
    return found
