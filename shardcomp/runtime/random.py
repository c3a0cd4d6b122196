"""The random numbers of one rank: emitted code draws from `self.random.shared`, `self.random.own` and
`self.random.same_shard`.

Every rank of a tensor-parallel group draws in the same order, so that a stream they share gives each of them the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from shardcomp.ir.mesh import AXES, Mesh
from shardcomp.kernels.dropout import OWN, SAME_SHARD, SHARED, Stream


class Streams:
    """The streams of one rank, started from a seed and the rank's place on the mesh; no two of a world are the same.

    shared: the same on every rank of a tensor-parallel group, for replicated values. own: this rank's, for sharded ones.
    same_shard: the same on the neighbouring ranks that have copies of one shard. All differ between ranks of the other axes,
    which have other samples, another part of the sequence or other layers.
    """

    def __init__(self, seed: int, mesh: Mesh, coordinates: Mapping[str, int], device: torch.device) -> None:
        self.seed, self.mesh, self.coordinates, self.device = seed, mesh, dict(coordinates), device
        self.restart(0)

    def restart(self, step: int) -> None:
        """Start again, with other numbers for every `step`: a run does so that resumes on another mesh."""
        seed, mesh, coordinates, device = self.seed, self.mesh, self.coordinates, self.device
        group = 0
        for axis in AXES:
            if axis != "tp":
                group = group * mesh.size(axis) + coordinates[axis]
        # Hashed, so that the streams of one seed differ from the streams of the next. The CPU's generator looks at 32 bits
        # only: consecutive numbers differ there, too.
        start = int.from_bytes(hashlib.sha256(f"dropout {seed}{f' {step}' if step else ''}".encode()).digest()[:7])
        start += group * (1 + 2 * mesh.tp)
        self.shared = Stream(start, device)
        self.own = Stream(start + 1 + coordinates["tp"], device)
        self.same_shard = Stream(start + 1 + mesh.tp + coordinates["tp"] // mesh.copies, device)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of every stream as uint8 tensors on the CPU, for a checkpoint of this rank or to draw the same again."""
        return {name: getattr(self, name).generator.get_state() for name in (SHARED, OWN, SAME_SHARD)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`. Raises KeyError for a stream that is not in it."""
        for name in (SHARED, OWN, SAME_SHARD):
            getattr(self, name).generator.set_state(state[name])

    @contextmanager
    def replayed(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, draw again as after `state`. Afterwards the streams continue from where they are now."""
        now = self.state_dict()
        self.load_state_dict(state)
        try:
            yield
        finally:
            self.load_state_dict(now)
