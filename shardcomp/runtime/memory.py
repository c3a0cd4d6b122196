"""The memory of a rank between two operators, in bytes, counted from its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from shardcomp.runtime.fsdp import iter_tensors
from shardcomp.runtime.gradients import local
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.torch_private import storage_id

ROLES = ("parameters", "gathered", "unreduced", "gradients", "optimizer")
PLACES = ("device", "host")


def memory_by_role(
    stage_shards: Iterable[StageShard],
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    stashed: Iterable[Tensor] = (),
) -> dict[str, dict[str, int]]:
    """Place ("device" or "host") -> role -> bytes. Every storage counts once, with its padding.

    parameters: the shards that an optimizer updates. gathered: copies in the compute dtype, also those under way. unreduced:
    gradients before they are reduced over dp. gradients: reduced ones, and the `stashed` ones. optimizer: its states.
    Activations and the temporary memory of operators and messages do not count. Without an accelerator, what the plan offloads
    counts as on the host.
    """
    nbytes = {place: dict.fromkeys(ROLES, 0) for place in PLACES}
    seen: set[int] = set()
    for role, tensor, on_host in _all(list(stage_shards), optimizer, stashed):
        shard = local(tensor.detach())
        storage = shard.untyped_storage()
        if storage_id(shard) not in seen:
            seen.add(storage_id(shard))
            there = on_host if device.type == "cpu" else storage.device.type == "cpu"
            nbytes[PLACES[there]][role] += storage.nbytes()
    return nbytes


def _all(
    stage_shards: list[StageShard], optimizer: torch.optim.Optimizer | None, stashed: Iterable[Tensor]
) -> Iterator[tuple[str, Tensor, bool]]:
    hosted: dict[int, bool] = {}
    for stage_shard in stage_shards:
        for role, tensor, on_host in iter_tensors(stage_shard):
            if role == "parameters":
                hosted[id(tensor)] = on_host
            yield role, tensor, on_host
    yield from (("gradients", gradient, False) for gradient in stashed)
    for parameter, state in optimizer.state.items() if optimizer else ():
        on_host = hosted.get(id(parameter), False)
        yield from (("optimizer", moment, on_host) for moment in state.values() if isinstance(moment, Tensor))
