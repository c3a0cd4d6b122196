"""The full tensor of a DTensor, also where FSDP shards a dim unevenly that tensor parallelism has split. torch's own
`full_tensor` refuses that."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from shardcomp.ir.collectives import Axis
from shardcomp.torch_private import StridedShard


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank of its mesh. All of them call this together. A plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    # The order in which the axes split it: from the outermost to the innermost, but strided ones last.
    splits = [(isinstance(p, StridedShard), axis, p.dim) for axis, p in enumerate(tensor.placements) if hasattr(p, "dim")]
    lengths = list(tensor.shape)
    steps: list[tuple[int, int, int]] = []
    for _, axis, dim in sorted(splits):
        length, size, at = lengths[dim], mesh.size(axis), mesh.get_local_rank(axis)
        step = -(-length // size)
        steps.append((axis, dim, length))
        lengths[dim] = max(0, min(step, length - at * step))
    # Gather in the opposite order. Shards are padded to one size, since the last one may be shorter or empty.
    result = tensor.to_local().to(mesh.device_type)  # a shard on the host is sent from the device
    for axis, dim, length in reversed(steps):
        size = mesh.size(axis)
        if size == 1:
            continue
        missing = -(-length // size) - result.shape[dim]
        padded = pad(result, [0, 0] * (result.dim() - 1 - dim) + [0, missing]) if missing else result
        group = Axis(str(axis), size, mesh.get_local_rank(axis), mesh.get_group(axis))
        result = group.all_gather(padded, dim).narrow(dim, 0, length)
    return result
