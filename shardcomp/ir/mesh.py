"""The axes of the cluster: degrees, the coordinates of a rank, and the torch `DeviceMesh` that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "cp", "tp")
"""Outermost first: neighbouring ranks share a tensor-parallel group."""
FACTORS = ("tp_kv", "tp_rep")
"""What tp is factored into, outermost first."""
SHARDING = ("dp_replicate", "dp_shard")
"""What dp is factored into where ZeRO shares over groups of ranks, outermost first."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of pipeline, data, context and tensor parallelism.

    copies: where there are more tensor-parallel ranks than key-value heads, tp is factored into (tp_kv, tp_rep): some
    weights are sharded along tp_kv, and the `copies` neighbouring ranks along tp_rep have the same shard.
    replicas: how many copies there are of what ZeRO shares; dp is factored into (dp_replicate, dp_shard).
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    copies: int = 1
    replicas: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def size(self, axis: str) -> int:
        if axis in FACTORS:
            return self.copies if axis == FACTORS[1] else self.tp // self.copies
        if axis in SHARDING:
            return self.replicas if axis == SHARDING[0] else self.dp // self.replicas
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinate of `rank` on each axis."""
        coordinates = {}
        # The last axis changes fastest from rank to rank, so it is divided out first.
        for axis in reversed(AXES):
            rank, coordinates[axis] = divmod(rank, self.size(axis))
        return {axis: coordinates[axis] for axis in AXES}

    def as_dict(self) -> dict[str, int]:
        return {axis: self.size(axis) for axis in AXES}

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The `DeviceMesh` of this shape over the running process group."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device_type, tuple(self.size(axis) for axis in AXES), mesh_dim_names=AXES)

    def engine_mesh(self, mesh: DeviceMesh, factored: bool = False) -> DeviceMesh:
        """`mesh` with dp in its two factors where ZeRO shares over groups, and with tp in its two where `factored`; `mesh`
        itself where neither has any."""
        from torch.distributed.device_mesh import init_device_mesh

        data = SHARDING if self.replicas > 1 else ("dp",)
        tensor = FACTORS if factored and self.copies > 1 else ("tp",)
        names = ("pp", *data, "cp", *tensor)
        if names == AXES:
            return mesh
        return init_device_mesh(mesh.device_type, tuple(self.size(axis) for axis in names), mesh_dim_names=names)
