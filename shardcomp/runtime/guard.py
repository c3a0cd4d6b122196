"""What surrounds every call of a sharded model: the contexts it can run in, errors that say where, and state that is put back
after a failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shardcomp.errors import ShardError
from shardcomp.ir.collectives import Axis
from shardcomp.runtime.backward import BackwardPasses
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.contexts import check_contexts, computable, say_where
from shardcomp.runtime.fsdp import check_not_replaced, reset
from shardcomp.runtime.inputs import shapes_of
from shardcomp.runtime.random import Streams
from shardcomp.runtime.stage_shard import StageShard


class CallGuard:
    """The checks around the calls of one model."""

    def __init__(
        self,
        blueprint: Blueprint,
        stage_shards: Sequence[StageShard],
        axes: Mapping[str, Axis],
        device: torch.device,
        random: Streams,
        passes: BackwardPasses,
    ) -> None:
        self._blueprint, self._stage_shards, self._axes = blueprint, stage_shards, axes
        self._device, self._random, self._passes = device, random, passes

    @contextmanager
    def running(self, call: str, batch: Mapping[str, Tensor], training: bool = False) -> Iterator[None]:
        """Every call runs within this. call: its name in messages. training: whether it computes gradients itself."""
        check_contexts(call, training)
        self._passes.recover()
        for stage_shard in self._stage_shards:
            check_not_replaced(stage_shard)
        with computable(call, self._device, self._blueprint.precision):
            try:
                yield
            except ShardError:
                raise
            except Exception as error:
                hint = "the dense model, called with the same batch, tells whether the error is its own"
                say_where(error, f"{call} of {shapes_of(batch)} failed on {self.where()}", hint)
                raise

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Where the code within fails on every rank, parameters and random numbers are as before."""
        before = self._random.state_dict()
        try:
            yield
        except Exception:
            for stage_shard in self._stage_shards:
                reset(stage_shard, self._device)
            self._random.load_state_dict(before)
            raise

    def where(self) -> str:
        """This rank and the plan, for messages."""
        at = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in self._axes.items() if axis.size > 1)
        mesh, first = self._blueprint.mesh, self._blueprint
        plan = f"tensor = {mesh.tp}, pipeline = {mesh.pp}, data = {mesh.dp}, zero = {first.zero}, precision = {first.precision}"
        return f"rank {torch.distributed.get_rank()}{f' ({at})' if at else ''} of the plan {plan}"
