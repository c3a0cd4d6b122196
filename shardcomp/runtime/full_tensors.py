"""The full tensors of a model under HuggingFace's names, fetched from all ranks: what `save_pretrained` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp.ir.collectives import Axis
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.stage_shard import StageShard

Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""(name, shape, dtype, a collective call that returns the tensor on the CPU), as `weights.huggingface` has it."""


class FullTensors:
    """Fetches parameters and buffers of a model from whichever ranks have them.

    users: the stages that use each parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        blueprint: Blueprint,
        stage_shards: Sequence[StageShard],
        axes: Mapping[str, Axis],
        users: Mapping[str, Sequence[int]],
        device: torch.device,
    ) -> None:
        self._model, self._blueprint, self._stage_shards = model, blueprint, stage_shards
        self._axes, self._users, self._device = axes, users, device

    @property
    def aliases(self) -> list[str]:
        """The further names of tied weights."""
        return [alias for plan in self._blueprint.parameters.values() for alias in plan.aliases]

    def names(self, with_aliases: bool) -> dict[str, list[str]]:
        """HuggingFace's name of each tensor -> the names of its packed slices, or its own."""
        parts = {name: plan.part for name, plan in self._blueprint.parameters.items()}
        names = {**group_by_packed(parts), **{name: [name] for name in self._blueprint.persistent_buffers}}
        return names | {alias: [alias] for alias in self.aliases} if with_aliases else names

    def entries(self, names: Mapping[str, Sequence[str]]) -> list[Entry]:
        """What to write for each of `names`, in the same order on every rank."""
        parts = {name: plan.part for name, plan in self._blueprint.parameters.items()}
        entries = []
        for name, slices in names.items():
            shape, dtype = self._shape(slices[0])
            part = parts.get(slices[0])
            fetch = self._fetcher(name, {slice_: parts.get(slice_) for slice_ in slices})
            entries.append((name, part.shape if part else shape, dtype, fetch))
        return entries

    def local(self, name: str) -> Tensor | None:
        """This rank's tensor by any of its names; None where only other pipeline ranks have it."""
        first = self._first_name(name)
        local_name = next((stage_shard.names[first] for stage_shard in self._stage_shards if first in stage_shard.names), first)
        path, _, leaf = local_name.rpartition(".")
        try:
            tensor: Tensor = getattr(self._model.get_submodule(path), leaf)
        except AttributeError:
            return None
        return tensor

    def _fetcher(self, name: str, parts: Mapping[str, PackedSlice | None]) -> Callable[[], Tensor]:
        """The collective call that returns a full tensor, a packed one assembled from its slices."""

        def fetch(slice_name: str) -> Tensor:
            local = self.local(slice_name)
            return self._from_its_stage(slice_name, local if local is None else full_tensor(local.detach())).cpu()

        if name in parts:
            return lambda: fetch(name)
        return lambda: assemble(name, parts, {slice_name: fetch(slice_name) for slice_name in parts})

    def _first_name(self, name: str) -> str:
        aliases = {alias: first for first, plan in self._blueprint.parameters.items() for alias in plan.aliases}
        return aliases.get(name, name)

    def _shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The full shape and the dtype of a parameter or buffer."""
        plan = self._blueprint.parameters.get(self._first_name(name))
        if plan is not None:
            return plan.shape, MASTER[self._blueprint.precision]
        buffer = self._blueprint.buffers[name]
        return tuple(buffer.shape), buffer.dtype

    def _from_its_stage(self, name: str, tensor: Tensor | None) -> Tensor:
        """Broadcast a full tensor along pp, from the first pipeline rank that has it."""
        axis = self._axes["pp"]
        if axis.size == 1:
            assert tensor is not None
            return tensor
        stages: Any = self._users.get(self._first_name(name)) or [
            unit.stage for unit in self._blueprint.units if name in unit.buffers.values()
        ]
        if not stages:  # a buffer that no unit uses, which every rank has
            assert tensor is not None
            return tensor
        source = SCHEDULES[self._blueprint.schedule].rank_of(stages[0], axis.size)
        if tensor is None or axis.rank != source:
            shape, dtype = self._shape(name)
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        tensor = tensor.to(self._device).contiguous()
        torch.distributed.broadcast(tensor, group=axis.group, group_src=source)
        return tensor
