"""Whether a checkpoint fits a run: all violations at once, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from shardcomp.checkpoint.boxes import original_name
from shardcomp.checkpoint.stored import Stored
from shardcomp.ir.packed import group_by_packed
from shardcomp.runtime.model import ShardedModel

SHOWN = 8
"""How many names a message lists."""


def violations(stored: Stored, sharded: ShardedModel, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> Iterator[str]:
    """Why a checkpoint cannot be loaded into this run; nothing where it can."""
    plans = sharded.blueprint.parameters
    own = group_by_packed({name: plan.part for name, plan in plans.items()})
    for what, names in (("missing in it", own.keys() - stored.packed), ("not in the model", stored.packed.keys() - own)):
        if names:
            yield f"{len(names)} tensors are {what}: {_some(sorted(names))}"
    for name in sorted(own.keys() & stored.packed.keys()):
        plan = plans[own[name][0]]
        here, there = plan.part.shape if plan.part else plan.shape, stored.original_shape(name)
        if here != there:
            yield f"{name} is {_sizes(there)} in it and {_sizes(here)} in the model"
    for name in sharded.blueprint.persistent_buffers:
        if f"model/{name}" not in stored:
            yield f"the buffer {name} is missing in it"
    if optimizer is not None and stored.manifest["optimizer"] != type(optimizer).__name__:
        yield f"it holds the states of {stored.manifest['optimizer'] or 'no optimizer'}, not of {type(optimizer).__name__}"
    elif optimizer is not None and own.keys() == stored.packed.keys():
        yield from _group_violations(stored, sharded, optimizer)
    if scheduler is not None and stored.manifest["scheduler"] is None:
        yield "it holds no state of a scheduler"


def _group_violations(stored: Stored, sharded: ShardedModel, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    names = {id(parameter): name for name, shard in sharded.local_shards().items() for parameter in shard.parameters}
    for number, group in enumerate(optimizer.param_groups):
        own = [original_name(names[id(p)], sharded.blueprint.parameters) for p in group["params"] if id(p) in names]
        if len(own) < len(group["params"]):
            yield f"{len(group['params']) - len(own)} parameters of the optimizer are not the model's"
        saved = {id(group): name for name in own if (group := stored.group_of(name))}
        if len(saved) > 1:
            two = " and ".join(list(saved.values())[:2])
            yield f"{two} are in group {number} of the optimizer, and in two groups in it: make the groups as they were"
        without = [name for name in own if not stored.group_of(name)]
        if without:
            yield f"the optimizer of the checkpoint did not have {len(without)} of the parameters: {_some(without)}"


def _sizes(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape) or "a scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
