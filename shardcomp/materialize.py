"""`shard()`: allocates what `lower()` decided, and hands over a ShardedModel."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardcomp.errors import CaptureError, PlanError
from shardcomp.ir.packed import group_by_packed
from shardcomp.ir.program import Signature, value
from shardcomp.kernels.attention import attention
from shardcomp.kernels.attention_providers import probe
from shardcomp.lowering import TRAINING, Lowered, lower
from shardcomp.policy import Policy
from shardcomp.runtime import unit, world
from shardcomp.runtime.allocation import Weights
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.construction import build
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.origin import Origin, mode_of
from shardcomp.weights.huggingface import WeightFiles
from shardcomp.weights.initialization import initialize_parameter

DEFAULT_LENGTH = 2048
"""Only reports depend on the length that a plan is lowered for; this one's multiples always divide."""

PROBED = 64
"""The sequence length that an attention is tried at."""


def shard(
    model: nn.Module,
    policy: Policy | str | Path,
    checkpoint: str | Path | None = None,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    sync_weights: bool = False,
) -> ShardedModel:
    """Turn an unmodified model into this rank's part of it.

    Runs under torchrun, or as one rank without it. Everything that cannot be done raises a ShardError before a process group is
    started or anything is allocated. `model` itself is left as it was.

    Args:
        model: real weights are sliced and kept; weights on meta come from `checkpoint`, or else from the model's own
            initialisation rule, the same numbers on every topology. Its mode, training or evaluating, is kept.
        policy: a policy, the name of one, or a file.
        checkpoint: a HuggingFace directory, of which only this rank's part is read.
        inputs: the names of the [b, s] tensors in the call that training makes, which is captured first. By default `input_ids`
            and `labels`, or for a model whose own loss cannot be captured `input_ids` alone.
        outputs: what that call returns; by default the loss where there are labels, else the logits.
        sync_weights: take rank 0's numbers where each rank built a model of its own. Without it, ranks that differ are refused.

    Raises:
        ShardError: its subclasses say which part cannot be honoured, and what would do.

    Example:
        sharded = shardcomp.shard(model, shardcomp.Policy.load("auto", tensor=2))
    """
    chosen = policy if isinstance(policy, Policy) else Policy.load(policy)
    lowered = _lower_first(model, chosen, inputs, outputs)
    return allocate(lowered, weights_of(lowered, checkpoint), same=_given_whole(model, checkpoint), sync_weights=sync_weights)


def _lower_first(model: nn.Module, policy: Policy, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Lowered:
    """Lower the call that training makes. Where nobody says which and the model's own loss cannot be captured, that for the
    logits, with a warning; and in the model's own mode where it cannot be captured in training mode."""
    seq = policy.options.tensor * DEFAULT_LENGTH
    mode = mode_of(model)
    if inputs is None and outputs is not None:
        raise PlanError(
            f"shard: outputs = {tuple(outputs)} needs inputs=, the names of the call's tensors, such as ('input_ids',)"
        )
    calls = [TRAINING, Signature((("input_ids", 2),), ("logits",))]
    if inputs is not None:
        chosen = tuple(outputs) if outputs else ("loss",) if "labels" in inputs else ("logits",)
        calls = [Signature(tuple(sorted((name, 2) for name in inputs)), chosen)]
    # A model that is to evaluate is lowered for training as well: most of those are trained after all.
    modes = [None] if mode is None else [True] if mode else [True, False]
    failures: list[CaptureError] = []
    for call in calls:
        for training in modes:
            try:
                lowered = lower(model, policy, world.world_size(), seq, signature=replace(call, training=training))
            except CaptureError as error:
                failures.append(error)
                continue
            if call is not calls[0]:
                warnings.warn(
                    f"the model's own loss cannot be captured, so that train_step and eval_step are not there: {failures[0]}. "
                    "Compute a loss of your own of sharded(input_ids=...).logits; its backward works as usual",
                    stacklevel=3,
                )
            return lowered
    raise failures[0]


def _given_whole(model: nn.Module, checkpoint: str | Path | None) -> list[tuple[str, Tensor]]:
    """The tensors of a model that every rank has whole, and from which it takes its part."""
    tensors = [*model.named_parameters(), *model.named_buffers()] if checkpoint is None else []
    return [(name, tensor) for name, tensor in tensors if not tensor.is_meta]


def allocate(
    lowered: Lowered,
    weights: Weights,
    blueprint: Blueprint | None = None,
    same: Iterable[tuple[str, Tensor]] = (),
    sync_weights: bool = False,
) -> ShardedModel:
    """Build a lowered model on the running process group; further call signatures are lowered when they are first used.

    `blueprint` stands in for the lowered model's own. `same` and `sync_weights` are those of `runtime.model.build`.
    """
    probe(_attention_calls(lowered))
    if lowered.policy.options.compile:
        unit.probe(world.device_of_rank())
    chosen = blueprint or lowered.blueprint()
    saved = {name: weights(name, _all(chosen.buffers[name])) for name in chosen.persistent_buffers}
    chosen = replace(chosen, buffers={**chosen.buffers, **saved})
    origin = Origin.of(lowered.model)
    return build(chosen, weights, None, lowered.for_call, origin, same, sync_weights)


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
    read = _files(lowered, checkpoint) if checkpoint is not None else _of_the_model(lowered, list(group_by_packed(parts)))

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
            found = last[name] = initialize_parameter(name, model, seed, torch.float32)
        return found

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        if name in buffers:
            return buffers[name].value[index]
        return initial(name)[index] if meta else real[name].detach()[index]

    return read
