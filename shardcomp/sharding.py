"""`shard()`: allocates what `lower()` decided, and hands over a ShardedModel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shardcomp.errors import PlanError
from shardcomp.lowering import Lowered, lower
from shardcomp.parts import packed
from shardcomp.policy import Policy
from shardcomp.runtime import world
from shardcomp.runtime.allocation import Weights
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.huggingface import WeightFiles
from shardcomp.runtime.initialisation import initialise
from shardcomp.runtime.model import ShardedModel, build

DEFAULT_LENGTH = 2048
"""Only reports depend on the length that a plan is lowered for; this one's multiples always divide."""


def shard(model: nn.Module, policy: Policy | str | Path, checkpoint: str | Path | None = None) -> ShardedModel:
    """Turn an unmodified model into this rank's part of it.

    Runs under torchrun, or as one rank without it. Real weights of `model` are cut and kept; weights on meta come from
    `checkpoint`, a HuggingFace directory of which only this rank's part is read, else from the model's own initialisation rule,
    the same numbers on every topology. `model` itself is left as it was. Everything that cannot be done raises a ShardError
    before a process group is started or anything is allocated.
    """
    chosen = policy if isinstance(policy, Policy) else Policy.load(policy)
    degree = chosen.options.tensor
    lowered = lower(model, chosen, world_size=world.world_size(), seq=degree * DEFAULT_LENGTH)
    return allocate(lowered, weights_of(lowered, checkpoint))


def allocate(lowered: Lowered, weights: Weights, blueprint: Blueprint | None = None) -> ShardedModel:
    """Build a lowered model on the running process group; further call signatures are lowered when they are first used.

    `blueprint` stands in for the lowered model's own.
    """
    chosen = blueprint or lowered.blueprint()
    saved = {name: weights(name, _all(chosen.buffers[name])) for name in chosen.persistent_buffers}
    chosen = replace(chosen, buffers={**chosen.buffers, **saved})
    return build(chosen, weights, getattr(lowered.model, "config", None), lowered.for_call)


def _all(held: Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in held.shape)


def weights_of(lowered: Lowered, checkpoint: str | Path | None = None) -> Weights:
    """Where each parameter's numbers come from: the checkpoint, the model's real tensors, or its initialisation rule. A part of
    a packed weight is read from the packed one.

    Buffers that belong to the model's state come from the checkpoint or from the model.
    """
    parts = {name: p.part for name, p in lowered.program.parameters.items()}
    read = _files(lowered, checkpoint) if checkpoint is not None else _of_the_model(lowered, list(packed(parts)))

    def weights(name: str, index: tuple[slice, ...]) -> Tensor:
        part = parts.get(name)
        return part.read(read, index) if part else read(name, index)

    return weights


def _files(lowered: Lowered, checkpoint: str | Path) -> Weights:
    parameters, buffers = lowered.program.parameters, lowered.program.buffers
    files = WeightFiles(checkpoint)
    expected = {p.part.of if p.part else p.name: p.part.shape if p.part else tuple(p.shape) for p in parameters.values()}
    expected |= {name: tuple(buffer.value.shape) for name, buffer in buffers.items() if buffer.persistent}
    files.check(expected, lowered.program.canonical_names(), lowered.model)
    master = MASTER[lowered.policy.options.precision]
    return lambda name, index: files.read(name, index, buffers[name].value.dtype if name in buffers else master)


def _of_the_model(lowered: Lowered, names: list[str]) -> Weights:
    model, buffers, seed = lowered.model, lowered.program.buffers, lowered.policy.options.seed
    real: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    meta = [name for name in names if real[name].is_meta]
    if meta and len(meta) < len(names):
        raise PlanError(
            f"{len(meta)} of {len(names)} parameters are on meta, such as {meta[0]}: give all or none, or checkpoint="
        )

    last: dict[str, Tensor] = {}  # the parts of a packed weight ask for it in turn

    def initial(name: str) -> Tensor:
        found = last.get(name)
        if found is None:
            last.clear()
            found = last[name] = initialise(name, model, seed, torch.float32)
        return found

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        if name in buffers:
            return buffers[name].value[index]
        return initial(name)[index] if meta else real[name].detach()[index]

    return read
