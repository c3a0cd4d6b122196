"""From a lowered model to one that trains: the process group, memory and numbers, compared between ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shardcomp.ir.collectives import Axis
from shardcomp.runtime import world
from shardcomp.runtime.allocation import Weights, allocate, tied_axes
from shardcomp.runtime.blueprint import COMPUTE, MASTER, Blueprint
from shardcomp.runtime.call_cache import Lower
from shardcomp.runtime.fsdp import use_separate_gather_buffers
from shardcomp.runtime.gradients import local
from shardcomp.runtime.main_grad import accumulate_in_main_grads
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.origin import Origin
from shardcomp.runtime.weight_check import broadcast_from_first, check_replicated, check_same


def build(
    blueprint: Blueprint,
    weights: Weights,
    config: Any = None,
    lower: Lower | None = None,
    origin: Origin | None = None,
    same: Iterable[tuple[str, Tensor]] = (),
    sync_weights: bool = False,
) -> ShardedModel:
    """Allocate this rank's part of a lowered model.

    Args:
        blueprint: what the model was lowered to.
        weights: returns a slice of a parameter, and is called for this rank's shard of each.
        config: the HuggingFace configuration, where there is no `origin`.
        lower: lowers further calls; None where there is only the source of one.
        origin: what to keep of the dense model.
        same: named full tensors that must be the same on every rank.
        sync_weights: whether every rank takes rank 0's numbers.

    Raises:
        PlanError: where ranks that hold the same part of a parameter start from other numbers.
    """
    same = list(same)
    names = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in same)
    facts = {"policy": repr(blueprint.policy), "program": "\n".join(blueprint.sources), "model": names}
    public, device = world.start(blueprint.mesh, facts if blueprint.compare_ranks else {})
    mesh = blueprint.mesh.engine_mesh(public)
    factored = blueprint.mesh.engine_mesh(public, factored=True) if blueprint.mesh.copies > 1 else mesh
    axes = world.axes_of(public, mesh, factored)
    coordinates = {name: axis.rank for name, axis in axes.items()}
    everyone = world.everyone()
    if blueprint.compare_ranks and not sync_weights:
        check_same(same, everyone, device)
    tree, stage_shards = allocate(blueprint, weights, mesh, factored, coordinates, device)
    for stage_shard in stage_shards:
        use_separate_gather_buffers(stage_shard)
        if COMPUTE[blueprint.precision] != MASTER[blueprint.precision]:
            accumulate_in_main_grads(stage_shard)
    origin = origin or Origin(config)
    model = ShardedModel(blueprint, tree, stage_shards, public, device, axes, tied_axes(blueprint, public), origin, lower)
    if sync_weights:
        _take_from_first_rank(model, weights, everyone)
    if blueprint.compare_ranks:
        shards = {name: (shard.index, local(shard.parameters[0])) for name, shard in model.local_shards().items()}
        check_replicated(shards, blueprint.parameters, everyone, device)
    return model


@torch.no_grad()
def _take_from_first_rank(model: ShardedModel, weights: Weights, everyone: Axis) -> None:
    """Give every rank the numbers that rank 0 reads, one full parameter or buffer at a time."""
    shards = model.local_shards()
    for name, plan in model.blueprint.parameters.items():
        tensor = broadcast_from_first(weights(name, tuple(slice(0, size) for size in plan.shape)), everyone, model.device)
        for parameter in shards[name].parameters if name in shards else ():
            local(parameter).copy_(tensor[shards[name].index])
    own = dict(model.named_buffers())
    for name, buffer in model.blueprint.buffers.items():
        tensor = broadcast_from_first(buffer, everyone, model.device)
        buffer.copy_(tensor)  # further calls register it from here
        if name in own:
            own[name].copy_(tensor)
