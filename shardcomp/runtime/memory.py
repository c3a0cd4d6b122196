"""What a rank holds between operators, in bytes, counted on its own tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from shardcomp.runtime.allocation import StageShard
from shardcomp.runtime.fsdp import iter_tensors
from shardcomp.runtime.gradients import local

ROLES = ("parameters", "gathered", "unreduced", "gradients", "optimizer")
PLACES = ("device", "host")


def memory_by_role(
    stage_shards: Iterable[StageShard],
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    set_aside: Iterable[Tensor] = (),
) -> dict[str, dict[str, int]]:
    """Place ("device" or "host") -> role -> bytes, each storage once, padding counted.

    parameters: the pieces that an optimizer updates. gathered: whole copies in the compute dtype, also those under way.
    unreduced: gradients before their sum over dp. gradients: behind it, and those that were `set_aside`. optimizer: its states.
    What activations, operators and messages take while they run is not counted. Without an accelerator, what the plan leaves to
    the host counts as there.
    """
    found = {place: dict.fromkeys(ROLES, 0) for place in PLACES}
    seen: set[int] = set()
    for role, held, on_host in _all(list(stage_shards), optimizer, set_aside):
        storage = local(held.detach()).untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            there = on_host if device.type == "cpu" else storage.device.type == "cpu"
            found[PLACES[there]][role] += storage.nbytes()
    return found


def _all(
    stage_shards: list[StageShard], optimizer: torch.optim.Optimizer | None, set_aside: Iterable[Tensor]
) -> Iterator[tuple[str, Tensor, bool]]:
    hosted: dict[int, bool] = {}
    for stage_shard in stage_shards:
        for role, held, on_host in iter_tensors(stage_shard):
            if role == "parameters":
                hosted[id(held)] = on_host
            yield role, held, on_host
    yield from (("gradients", held, False) for held in set_aside)
    for parameter, state in optimizer.state.items() if optimizer else ():
        on_host = hosted.get(id(parameter), False)
        yield from (("optimizer", held, on_host) for held in state.values() if isinstance(held, Tensor))
