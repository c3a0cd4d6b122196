"""The compiler as one list of passes: `lower` turns a HuggingFace model into the modules that one rank runs.

`lower` allocates no weights; `shardcomp.materialize` does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from shardcomp import pass_runner, presets
from shardcomp.capture import Exports, capture
from shardcomp.capture.flatten import mark_gradients
from shardcomp.capture.input_bounds import unchecked_labels
from shardcomp.errors import Violations
from shardcomp.ir.program import Context, Program, Signature, module_paths
from shardcomp.lowered import Lowered
from shardcomp.passes import (
    canonicalize,
    emit,
    fuse_kernels,
    partition_units,
    pipeline,
    recompute,
    split_packed_weights,
    tensor_parallel,
    unflatten,
    zero,
)
from shardcomp.policy import Policy
from shardcomp.policy.auto import derive
from shardcomp.step import resolve_step

PASSES = [
    # pass                 what is true afterwards
    canonicalize,  #         canonical: ATen operators and kernels only, sizes in b and s, the loss divided by a given count
    unflatten,  #            unmerged: dimensions that the model merges and splits again stay unmerged
    split_packed_weights,  # parts: each slice of a packed weight is a parameter of its own
    partition_units,  #      units: the model is in the units that the policy names; alike units share a body
    fuse_kernels,  #         kernels: what a fused kernel computes is a call of it, where that is proved
    tensor_parallel,  #      layouts: every value has a layout; every message is a collective in the graph
    pipeline,  #             stages: every unit is in a stage; what a stage needs of others is sent to it or recomputed in it
    recompute,  #            recompute: every unit says what its backward recomputes; calls that are not run again are marked
    zero,  #                 zero: every unit says what its ranks shard and what the host keeps
    emit,  #                 source: the Python that runs
]

TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss",))
"""The call that training makes: tokens and labels, [b, s] int64 each."""


def lower(
    model_or_config: Any,
    policy: Policy | str | Path,
    world_size: int | None = None,
    seq: int | None = None,
    micro_batch: int = 1,
    global_batch: int | None = None,
    signature: Signature = TRAINING,
    sample: tuple[int, int] | None = None,
    exports: Exports | None = None,
    trained: frozenset[str] | None = None,
) -> Lowered:
    """Compile a model as `shard()` does, without a process group and without memory for weights.

    Args:
        model_or_config: a model (its weights may be on meta), a HuggingFace configuration, or what `presets.config_of` takes.
        policy: a policy, the name of one, or a file.
        world_size: the number of ranks; by default what the policy's degrees make with data = 1.
        seq: tokens in a sequence, for reports; by default the legal length nearest to 2048.
        micro_batch: sequences in one forward of a rank, for reports.
        global_batch: sequences in one step of all ranks, for reports; by default one micro-batch for each data-parallel rank.
        signature: the call to lower.
        sample: the (batch, length) to capture a model at that has static shapes only.
        exports: the exports of this model's other calls, to be used again.
        trained: the names of the parameters that have requires_grad; by default as the model has them.

    Raises:
        ShardError: with every violation at once.
    """
    policy = policy if isinstance(policy, Policy) else Policy.load(policy)
    violations = Violations(policy.source)
    step = resolve_step(policy, world_size, seq, micro_batch, global_batch, violations)
    model = model_or_config if isinstance(model_or_config, nn.Module) else presets.build(presets.config_of(model_or_config))
    exports = {} if exports is None else exports
    program = capture(model, signature, precision=policy.options.precision, sample=sample or step.sample, exports=exports)
    if trained is not None:
        program.parameters = {name: replace(p, requires_grad=name in trained) for name, p in program.parameters.items()}
        mark_gradients(program.units[0].body, program.parameters)
    context = Context(step.mesh, policy, micro_batch, step.seq)
    with violations.collected():
        records = _run_passes(program, context, model)
    # A refused degree of tensor parallelism ends the passes. The later ones are asked without it.
    if violations.errors and step.mesh.tp > 1:
        with violations.collected():
            _run_passes(program, replace(context, mesh=replace(step.mesh, tp=1), policy=policy.replace(tensor=1)), model)
    violations.raise_if_any()
    lowered = records[-1].program
    lowered.degraded = [*lowered.degraded, *unchecked_labels(records[0].program), *step.degraded]
    sizes = (step.seq, micro_batch, step.global_batch)
    return Lowered(model, context.policy, step.mesh, records, *sizes, exports, _lower=lower)


def _run_passes(program: Program, context: Context, model: nn.Module) -> list[pass_runner.Record]:
    """All passes. Puts the entries that the policy `auto` finds into `context`."""
    if context.policy.automatic:
        context.policy = derive(program, context.policy, context.mesh, getattr(model, "_tp_plan", None))
    names, model_type = program.canonical_names(), getattr(program.config, "model_type", None)
    context.policy.check(program.parameters, module_paths(program), names, model_type)
    return pass_runner.run(program, context, PASSES)
