"""The step that a model is lowered for: the mesh, the length of a sequence, and the batch."""

from __future__ import annotations

from dataclasses import dataclass

from shardcomp.errors import PlanError, Violations
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import Degraded
from shardcomp.policy import Policy

SEQ = 2048
"""Tokens in a sequence, where nobody says."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: `global_batch` sequences of `seq` tokens over a mesh, `micro_batch` of them at a time on a rank."""

    mesh: Mesh
    seq: int
    micro_batch: int
    global_batch: int
    degraded: tuple[Degraded, ...] = ()
    """What differs from the defaults."""

    @property
    def sample(self) -> tuple[int, int]:
        """The (batch, length) to capture a model at that has static shapes only: small, a length that splits over the ranks,
        and no sizes that a model is likely to have."""
        return 3, -(-18 // self.mesh.tp) * self.mesh.tp


def resolve_step(
    policy: Policy, world_size: int | None, seq: int | None, micro_batch: int, global_batch: int | None, violations: Violations
) -> Step:
    """The step that the arguments of `lower()` describe. What is wrong with them is added to `violations`."""
    options = policy.options
    mesh = Mesh(pp=options.pipeline, tp=options.tensor)
    with violations.collected():
        mesh = policy.mesh(world_size or options.ranks)
    rows = mesh.dp * micro_batch
    batch = global_batch or rows
    if batch % rows and not violations.errors:  # of a world that is refused, nothing is known of data
        with violations.collected():
            what = f"a global batch of {batch} is not a multiple of data × micro-batch = {mesh.dp} × {micro_batch}"
            raise PlanError(f"{what}: use {_multiples(batch, rows)}")
    unit = mesh.tp if options.sequence_parallel else 1
    length = max(1, round((seq or SEQ) / unit)) * unit
    degraded: tuple[Degraded, ...] = ()
    if seq is None and length != SEQ:
        degraded = (Degraded(f"seq = {length}", f"the default, {SEQ}, does not split over tensor = {mesh.tp}"),)
    if seq is not None and seq != length:
        with violations.collected():
            raise PlanError(f"seq = {seq} does not split over tensor = {mesh.tp}: use {_multiples(seq, unit)}")
    return Step(mesh, length, micro_batch, batch, degraded)


def _multiples(number: int, unit: int) -> str:
    """The multiples of `unit` on both sides of a number that is none."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
