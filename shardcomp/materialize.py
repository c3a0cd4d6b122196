"""`shard()`: memory and numbers for what `lower()` decided, as a ShardedModel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from shardcomp.errors import CaptureError, PlanError
from shardcomp.ir.program import Signature
from shardcomp.kernels.attention_probe import small_calls
from shardcomp.kernels.attention_providers import probe
from shardcomp.lowered import Lowered
from shardcomp.lowering import TRAINING, lower
from shardcomp.policy import Policy
from shardcomp.runtime import unit, world
from shardcomp.runtime.allocation import Weights
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.construction import build
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.origin import Origin, mode_of
from shardcomp.weights.source import full_index, read_weights

DEFAULT_LENGTH = 2048
"""The sequence length that a plan is lowered for. Only reports depend on it. Multiples of it split over any `tensor`."""


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

    Runs under torchrun, or as one rank without it. What cannot be done raises a ShardError before a process group is started or
    memory is allocated. `model` itself does not change.

    Args:
        model: its real weights are sliced and copied. Weights on meta come from `checkpoint`, or else from the model's own
            initialization rule, with the same numbers on every topology. Its mode, training or evaluating, is taken over.
        policy: a policy, the name of one in `policies/`, a file, or "auto".
        checkpoint: a HuggingFace directory. Each rank reads only its own slices.
        inputs: the names of the [b, s] tensors of the call that training makes, which is captured first. By default `input_ids`
            and `labels`; for a model whose own loss cannot be captured, only `input_ids`.
        outputs: what that call returns. By default the loss where there are labels, else the logits.
        sync_weights: whether every rank takes rank 0's numbers. Without it, ranks whose models differ are refused.

    Returns:
        The module to train.

    Raises:
        ShardError: one of its subclasses, which says what cannot be done and what would do.

    Example:
        >>> import shardcomp
        >>> sharded = shardcomp.shard(model, "llama")
        >>> sharded.mesh.mesh_dim_names
        ('pp', 'dp', 'cp', 'tp')
    """
    policy = policy if isinstance(policy, Policy) else Policy.load(policy)
    lowered = _lower_first_call(model, policy, inputs, outputs)
    weights = weights_of(lowered, checkpoint)
    return allocate(lowered, weights, same=_replicated_sources(model, checkpoint), sync_weights=sync_weights)


def _lower_first_call(model: nn.Module, policy: Policy, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> Lowered:
    """Lower the call that training makes.

    Where the caller names none and the model's own loss cannot be captured, it is the call for logits, with a warning. A model
    in evaluation mode is lowered for training first, since most are trained after all, and else in its own mode.
    """
    seq = policy.options.tensor * DEFAULT_LENGTH
    mode = mode_of(model)
    if inputs is None and outputs is not None:
        raise PlanError(
            f"shard: outputs = {tuple(outputs)} needs inputs=, the names of the call's tensors, such as ('input_ids',)"
        )
    calls = [TRAINING, Signature((("input_ids", 2),), ("logits",))]
    if inputs is not None:
        names = tuple(outputs) if outputs else ("loss",) if "labels" in inputs else ("logits",)
        calls = [Signature(tuple(sorted((name, 2) for name in inputs)), names)]
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


def _replicated_sources(model: nn.Module, checkpoint: str | Path | None) -> list[tuple[str, Tensor]]:
    """The real tensors that every rank slices, which must be the same on all."""
    tensors = [*model.named_parameters(), *model.named_buffers()] if checkpoint is None else []
    return [(name, tensor) for name, tensor in tensors if not tensor.is_meta]


def allocate(
    lowered: Lowered,
    weights: Weights,
    blueprint: Blueprint | None = None,
    same: Iterable[tuple[str, Tensor]] = (),
    sync_weights: bool = False,
) -> ShardedModel:
    """Build a lowered model on the running process group. Further call signatures are lowered when they are first used.

    weights: as `weights_of` returns it. blueprint: replaces the lowered model's own. same, sync_weights: as in
    `runtime.construction.build`.
    """
    probe(small_calls(lowered.program, world.device_of_rank()))
    if lowered.policy.options.compile:
        unit.probe(world.device_of_rank())
    blueprint = blueprint or lowered.blueprint()
    saved = {name: weights(name, full_index(blueprint.buffers[name].shape)) for name in blueprint.persistent_buffers}
    blueprint = replace(blueprint, buffers={**blueprint.buffers, **saved})
    origin = Origin.of(lowered.model)
    return build(blueprint, weights, None, lowered.for_call, origin, same, sync_weights)


def weights_of(lowered: Lowered, checkpoint: str | Path | None = None) -> Weights:
    """The numbers of a lowered model, as a function of a parameter's name and a slice of it.

    They come from `checkpoint`, from the model's real tensors, or from its initialization rule. Persistent buffers come from
    the checkpoint or the model.
    """
    options = lowered.policy.options
    return read_weights(lowered.program, options.precision, lowered.model, options.seed, checkpoint)
