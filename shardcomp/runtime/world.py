"""The process group, this rank's device, and the axes of the mesh: started here if nobody has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.ir.mesh import Mesh
from shardcomp.runtime.weight_check import check_alike

ON_CPU = ("gloo", "threaded")
"""The backends whose ranks compute on the CPU, on a machine with GPUs as well: the second is that of ranks as threads."""


def world_size() -> int:
    """The number of ranks: of the running group, else as torchrun says, else one. Starts nothing."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(mesh: Mesh, facts: Mapping[str, str] = MappingProxyType({})) -> tuple[DeviceMesh, torch.device]:
    """Join the process group, which is started if nobody has, and make its device mesh.

    Raises PlanError where the ranks differ in one of `facts`, which may be none: their meshes would not fit together.
    """
    device = device_of_rank()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != mesh.world_size:
        raise PlanError(f"the plan is for {mesh.world_size} ranks, but the process group has {dist.get_world_size()}")
    check_alike(facts, everyone(), device)
    return mesh.device_mesh(device.type), device


def device_of_rank() -> torch.device:
    """The device that this rank computes on. Starts no process group."""
    if not torch.cuda.is_available() or (dist.is_initialized() and dist.get_backend() in ON_CPU):
        return torch.device("cpu")
    if dist.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def axes_of(*meshes: DeviceMesh) -> dict[str, Axis]:
    """The axes of meshes as this rank sees them, each from the first mesh that has it."""
    axes: dict[str, Axis] = {}
    for mesh in meshes:
        for name in mesh.mesh_dim_names or ():
            if name not in axes:
                size = mesh[name].size()
                axes[name] = Axis(name, size, mesh.get_local_rank(name), mesh.get_group(name) if size > 1 else None)
    return axes


def everyone() -> Axis:
    """All ranks, as an axis."""
    size = dist.get_world_size()
    return Axis("world", size, dist.get_rank(), dist.group.WORLD if size > 1 else None)


def host_axes(mesh: DeviceMesh, names: Sequence[str]) -> dict[str, Axis]:
    """Axes of the mesh whose groups exchange tensors of the host, beside an accelerator's. Called by all ranks together."""
    axes = {}
    for name in names:
        dim = (mesh.mesh_dim_names or ()).index(name)
        rows = mesh.mesh.movedim(dim, -1).flatten(0, -2).tolist()
        for ranks in rows if len(rows[0]) > 1 else ():
            group = dist.new_group(ranks, backend="gloo")
            if dist.get_rank() in ranks:
                axes[name] = Axis(name, len(ranks), ranks.index(dist.get_rank()), group)
    return axes
