"""The sharded side of a comparison: a lowered plan on all its ranks, and its results assembled as the dense model has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardcomp.errors import VerifyError
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.call_cache import CallSignature
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.optimizer import AdamW
from shardcomp.verification.dense_model import OPTIMIZER, OWN_LOSS_PRECISIONS, Batch, Outcome, own_loss
from shardcomp.verification.mutants import Mutant
from shardcomp.verification.thread_ranks import run_alone, run_ranks


class DisagreementError(VerifyError):
    """Two ranks have different numbers for what should be one."""


def run_plan(lowered: Lowered, batches: Mapping[str, Batch], updates: list[Batch], mutant: Mutant | None = None) -> Outcome:
    """Run a plan on all its ranks.

    The ranks are threads of this process if the batches are on the CPU, else this process is the only rank.

    Args:
        lowered: the plan.
        batches: a whole batch for every kind, each `int64[rows, length]`; every rank takes its rows.
        updates: the batches of optimizer steps, which come last.
        mutant: a deliberate error to run with. The logits are not computed then.

    Raises:
        DisagreementError: two ranks have different losses, or different copies of a gradient or weight.
    """
    weights = weights_of(lowered)
    slices = {name: parameter.part for name, parameter in lowered.program.parameters.items()}
    _lower_calls(lowered, batches, with_logits=mutant is None)

    def work(rank: int) -> _RankOutcome:
        torch.set_num_threads(1)
        sharded = allocate(lowered, weights, mutant.blueprint if mutant else None)
        if mutant is not None:
            mutant.plant(sharded)
        return _run(sharded, batches, updates, slices, with_logits=mutant is None)

    on_cpu = batches["causal"]["input_ids"].device.type == "cpu"
    ranks = (run_ranks if on_cpu else run_alone)(lowered.mesh.world_size, work)
    return _assemble_ranks(ranks, lowered.program.canonical_names())


@dataclass
class _RankOutcome(Outcome):
    """What one rank computed. Its logits are of its own rows; its gradients and weights are whole, of its own stages."""

    dp_rank: int = 0


def _lower_calls(lowered: Lowered, batches: Mapping[str, Batch], with_logits: bool) -> None:
    """Lower every call before the ranks start: threads cannot trace."""
    micro_batch = lowered.policy.options.micro_batch
    for batch in batches.values():
        lowered.for_call(_signature(batch, ("loss",)), (micro_batch or 1, batch["input_ids"].shape[1]))
    if with_logits:
        rows, length = batches["causal"]["input_ids"].shape
        rows //= lowered.mesh.dp
        rows_at_once = rows if lowered.mesh.pp == 1 else micro_batch or rows
        lowered.for_call(_signature(batches["causal"], ("loss", "logits")), (rows_at_once, length))


def _signature(batch: Batch, outputs: tuple[str, ...]) -> CallSignature:
    return tuple(sorted((name, tensor.dim()) for name, tensor in batch.items())), outputs, True


def _run(
    sharded: ShardedModel,
    batches: Mapping[str, Batch],
    updates: list[Batch],
    slices: Mapping[str, PackedSlice | None],
    with_logits: bool,
) -> _RankOutcome:
    outcome = _RankOutcome()
    outcome.dp_rank = sharded.mesh.get_local_rank("dp")

    def own_rows(batch: Batch) -> Batch:
        return {name: tensor.chunk(sharded.mesh["dp"].size())[outcome.dp_rank] for name, tensor in batch.items()}

    for kind, batch in batches.items():
        step = sharded.train_step(**own_rows(batch))
        while step.skipped and sharded.loss_scale.enabled and sharded.loss_scale.scale > 1:  # as a training loop would
            sharded.zero_grad()
            sharded.loss_scale.update(skipped=True)
            step = sharded.train_step(**own_rows(batch))
        outcome.loss[kind] = step.loss
        outcome.gradients[kind] = _join_slices(_full_tensors(sharded, lambda param: param.grad), slices)
        outcome.norm[kind] = sharded.clip_grad_norm_(math.inf)
        sharded.zero_grad()
    if with_logits:
        causal = own_rows(batches["causal"])
        if sharded.mesh["pp"].size() == 1:
            output = sharded(**causal, return_logits="whole")
            outcome.logits = output["logits"].detach()
            if sharded.blueprint.precision in OWN_LOSS_PRECISIONS:
                (output["loss"] + own_loss(output["logits"])).backward()
                outcome.own_gradients = _join_slices(_full_tensors(sharded, lambda param: param.grad), slices)
                sharded.zero_grad()
        else:
            outcome.logits = sharded.eval_step(**causal, return_logits="whole").logits
    if updates:
        trained = [param for param in sharded.parameters() if param.requires_grad]
        optimizer = AdamW(trained, **OPTIMIZER) if trained else None
        for batch in updates:
            sharded.train_step(**own_rows(batch))
            if optimizer is not None:  # all of this rank's stages may be frozen
                optimizer.step()
                optimizer.zero_grad()
        outcome.weights = _join_slices(_full_tensors(sharded, lambda param: param), slices)
    return outcome


def _full_tensors(sharded: ShardedModel, tensor_of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """A tensor of every parameter of this rank, gathered from all ranks. Raises DisagreementError where two stages of this rank
    have different copies of a tied weight."""
    params = dict(sharded.named_parameters())
    result: dict[str, Tensor] = {}
    for stage_shard in sharded._stage_shards:
        for name, param_name in stage_shard.names.items():
            tensor = tensor_of(params[param_name])
            if tensor is None:
                continue
            full = full_tensor(tensor.detach()).clone()
            if not torch.equal(result.setdefault(name, full), full):
                raise DisagreementError(f"two stages of one rank disagree about {name}: their copies differ")
    return result


def _join_slices(tensors: dict[str, Tensor], slices: Mapping[str, PackedSlice | None]) -> dict[str, Tensor]:
    """The tensors by the names of the dense model: the slices of a packed weight become one tensor."""
    names = [name for name, members in group_by_packed(slices).items() if any(member in tensors for member in members)]
    return {name: tensors[name] if name in tensors else assemble(name, slices, tensors) for name in names}


def _assemble_ranks(ranks: list[_RankOutcome], names: Mapping[str, str]) -> Outcome:
    """One outcome of all ranks. `names`: the further names of tied parameters -> their first ones."""
    outcome, others = ranks[0], ranks[1:]
    for kind, loss in outcome.loss.items():
        if any(not torch.equal(other.loss[kind], loss) for other in others):
            losses = [float(rank.loss[kind]) for rank in ranks]
            raise DisagreementError(f"the ranks disagree about the loss of the {kind} batch: {losses}")
    rows = {rank.dp_rank: rank.logits for rank in ranks if rank.logits is not None}
    outcome.logits = torch.cat([rows[dp_rank] for dp_rank in sorted(rows)]) if rows else None
    for other in others:
        for kind, gradients in other.gradients.items():
            _add_stages(outcome.gradients[kind], gradients, names)
        _add_stages(outcome.weights, other.weights, names)
    return outcome


def _add_stages(tensors: dict[str, Tensor], others: dict[str, Tensor], names: Mapping[str, str]) -> None:
    """Add the tensors of another pipeline rank's stages. Raises DisagreementError where two ranks have different copies of one,
    as of a tied weight."""
    for name, tensor in others.items():
        first_name = names.get(name, name)
        if not torch.equal(tensors.setdefault(first_name, tensor), tensor):
            raise DisagreementError(f"the ranks disagree about {first_name}: its copies on two ranks differ")
    for alias in names.keys() & tensors.keys():
        tensors.setdefault(names[alias], tensors.pop(alias))
