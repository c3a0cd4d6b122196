"""The axes of the cluster: degrees, the coordinates of a rank, and the torch `DeviceMesh` that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "cp", "tp")
"""Outermost first: neighbouring ranks share a tensor-parallel group."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of pipeline, data, context and tensor parallelism."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, self.size(axis))
        return {axis: found[axis] for axis in AXES}

    def as_dict(self) -> dict[str, int]:
        return {axis: self.size(axis) for axis in AXES}

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The `DeviceMesh` of this shape over the running process group."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device_type, tuple(self.size(axis) for axis in AXES), mesh_dim_names=AXES)
