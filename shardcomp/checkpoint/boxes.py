"""Which box of a full tensor this rank saves and loads, for parameters and the states of their optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from shardcomp.checkpoint.storage import Box
from shardcomp.runtime.blueprint import ParameterPlan
from shardcomp.runtime.stage_shard import LocalShard


def box_of(tensor: Tensor, shard: LocalShard) -> Box:
    """The box of a parameter, or of a tensor with the same shape and placements."""
    local = tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return Box(local, tuple(range_.start for range_ in shard.index), shard.shape)


def state_box(state: Tensor, parameter: Tensor, shard: LocalShard) -> Box | None:
    """The box of an optimizer's tensor: a 0-d one, or one like its parameter; None for anything else."""
    if state.shape == parameter.shape:
        return box_of(state, shard)
    return Box.full(state.detach()) if not state.dim() else None


def original_name(name: str, plans: Mapping[str, ParameterPlan]) -> str:
    """HuggingFace's name of a parameter: its own, or for a packed slice that of the packed weight."""
    part = plans[name].part
    return part.of if part else name
