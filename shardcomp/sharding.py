"""`shard()`: allocates what `lower()` decided, and hands over a ShardedModel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardcomp.errors import PlanError
from shardcomp.kernels.attention import attention
from shardcomp.kernels.providers import probe
from shardcomp.lowering import Lowered, lower
from shardcomp.parts import packed
from shardcomp.policy import Policy
from shardcomp.program import value
from shardcomp.runtime import unit, world
from shardcomp.runtime.allocation import Weights
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.huggingface import WeightFiles
from shardcomp.runtime.initialisation import initialise
from shardcomp.runtime.model import ShardedModel, build

DEFAULT_LENGTH = 2048
"""Only reports depend on the length that a plan is lowered for; this one's multiples always divide."""

PROBED = 64
"""The sequence length that an attention is tried at."""


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
    probe(_attention_calls(lowered))
    if lowered.policy.options.compile:
        unit.probe(world.device_of_rank())
    chosen = blueprint or lowered.blueprint()
    saved = {name: weights(name, _all(chosen.buffers[name])) for name in chosen.persistent_buffers}
    chosen = replace(chosen, buffers={**chosen.buffers, **saved})
    return build(chosen, weights, getattr(lowered.model, "config", None), lowered.for_call)


def _attention_calls(lowered: Lowered) -> list[Callable[[], Tensor]]:
    """A small call for each kind of attention whose provider the policy names, with the heads of one rank."""
    program, device = lowered.program, world.device_of_rank()
    sizes = program.mesh.as_dict()
    found: dict[Any, Callable[[], Tensor]] = {}
    for node in (node for body in program.bodies() for node in body.calls()):
        if node.target is not attention or "provider" not in node.kwargs:
            continue
        heads = [value(each) for each in node.args[:3]]  # type: ignore[arg-type]
        shapes = tuple(
            (int(local[1]), int(local[3])) for each in heads for local in [each.layout.local_shape(each.shape, sizes)]
        )
        tensors = frozenset(name for name, held in node.kwargs.items() if isinstance(held, fx.Node))
        plain = {n: held for n, held in node.kwargs.items() if n not in tensors and n not in ("dropout", "random")}
        key = (shapes, heads[0].dtype, tensors, tuple(sorted(plain.items())))
        found[key] = functools.partial(_small_attention, device, heads[0].dtype, shapes, tensors, plain)
    return list(found.values())


def _small_attention(
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, int], ...],
    tensors: frozenset[str],
    plain: dict[str, Any],
) -> Tensor:
    q, k, v = (torch.ones((1, n, PROBED, d), dtype=dtype, device=device, requires_grad=True) for n, d in shapes)
    numbers = torch.arange(PROBED, device=device).unsqueeze(0)
    made = {
        "q_position": numbers,
        "k_position": numbers,
        "q_segment": numbers // 16,
        "k_segment": numbers // 16,
        "key_mask": numbers >= 0,
        "bias": torch.zeros((1, 1, PROBED, PROBED), dtype=dtype, device=device),
        "sinks": torch.zeros(q.shape[1], dtype=dtype, device=device),
    }
    return attention(q, k, v, **{name: made[name] for name in tensors}, **plain)


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
