"""The sharded side of a comparison: a lowered plan on all its ranks, and its results assembled as the dense model has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.call_cache import CallSignature
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.optimizer import AdamW
from shardcomp.verification.dense_model import (
    OPTIMIZER,
    OWN_LOSS,
    OWN_LOSS_PRECISIONS,
    Batch,
    DifferingCopies,
    Outcome,
    RankCopy,
    own_loss,
)
from shardcomp.verification.mutants import Mutant
from shardcomp.verification.thread_ranks import run_alone, run_ranks


def run_plan(lowered: Lowered, batches: Mapping[str, Batch], updates: list[Batch], mutant: Mutant | None = None) -> Outcome:
    """Run a plan on all its ranks.

    The ranks are threads of this process if the batches are on the CPU, else this process is the only rank.

    Args:
        lowered: the plan.
        batches: a whole batch for every kind, each `int64[rows, length]`; every rank takes its rows.
        updates: the batches of optimizer steps, which come last.
        mutant: a deliberate error to run with. The logits are not computed then.

    Returns:
        What the ranks computed, as one outcome. Where two ranks have different losses, or different copies of a gradient or
        weight, its `disagreements` has them all.
    """
    weights = weights_of(lowered)
    slices = {name: parameter.part for name, parameter in lowered.program.parameters.items()}
    _lower_calls(lowered, batches, with_logits=mutant is None)

    def work(rank: int) -> _RankOutcome:
        torch.set_num_threads(1)
        sharded = allocate(lowered, weights, mutant.blueprint if mutant else None)
        if mutant is not None:
            mutant.plant(sharded)
        return _run(rank, sharded, batches, updates, slices, with_logits=mutant is None)

    on_cpu = batches["causal"]["input_ids"].device.type == "cpu"
    ranks = (run_ranks if on_cpu else run_alone)(lowered.mesh.world_size, work)
    return _assemble_ranks(ranks, lowered.program.canonical_names())


@dataclass
class _RankOutcome(Outcome):
    """What one rank computed. Its logits are of its own rows; its gradients and weights are whole, of its own stages."""

    rank: int = 0
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
    rank: int,
    sharded: ShardedModel,
    batches: Mapping[str, Batch],
    updates: list[Batch],
    slices: Mapping[str, PackedSlice | None],
    with_logits: bool,
) -> _RankOutcome:
    outcome = _RankOutcome(rank=rank, dp_rank=sharded.mesh.get_local_rank("dp"))

    def own_rows(batch: Batch) -> Batch:
        return {name: tensor.chunk(sharded.mesh["dp"].size())[outcome.dp_rank] for name, tensor in batch.items()}

    for kind, batch in batches.items():
        step = sharded.train_step(**own_rows(batch))
        while step.skipped and sharded.loss_scale.enabled and sharded.loss_scale.scale > 1:  # as a training loop would
            sharded.zero_grad()
            sharded.loss_scale.update(skipped=True)
            step = sharded.train_step(**own_rows(batch))
        outcome.loss[kind] = step.loss
        gradients = _full_tensors(sharded, lambda param: param.grad, outcome, "gradients", kind)
        outcome.gradients[kind] = _join_slices(gradients, slices)
        outcome.norm[kind] = sharded.clip_grad_norm_(math.inf)
        sharded.zero_grad()
    if with_logits:
        causal = own_rows(batches["causal"])
        if sharded.mesh["pp"].size() == 1:
            output = sharded(**causal, return_logits="whole")
            outcome.logits = output["logits"].detach()
            if sharded.blueprint.precision in OWN_LOSS_PRECISIONS:
                (output["loss"] + own_loss(output["logits"])).backward()
                gradients = _full_tensors(sharded, lambda param: param.grad, outcome, "gradients", OWN_LOSS)
                outcome.own_gradients = _join_slices(gradients, slices)
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
        outcome.weights = _join_slices(_full_tensors(sharded, lambda param: param, outcome, "weights", ""), slices)
    return outcome


def _full_tensors(
    sharded: ShardedModel,
    tensor_of: Callable[[nn.Parameter], Tensor | None],
    outcome: _RankOutcome,
    quantity: str,
    kind: str,
) -> dict[str, Tensor]:
    """A tensor of every parameter of this rank, gathered from all ranks.

    Two stages of this rank may have a copy of a tied weight each. Where these differ, `outcome.disagreements` gets both.
    """
    params = dict(sharded.named_parameters())
    copies: dict[str, list[tuple[int, Tensor]]] = {}
    for stage_shard in sharded._stage_shards:
        for name, param_name in stage_shard.names.items():
            tensor = tensor_of(params[param_name])
            if tensor is not None:
                copies.setdefault(name, []).append((stage_shard.index, full_tensor(tensor.detach()).clone()))
    for name, of_stages in copies.items():
        if any(not _equal(tensor, of_stages[0][1]) for _, tensor in of_stages):
            versions = [RankCopy([outcome.rank], stage, tensor) for stage, tensor in of_stages]
            outcome.disagreements.append(DifferingCopies(quantity, name, kind, versions))
    return {name: of_stages[0][1] for name, of_stages in copies.items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers. NaN equals NaN here: ranks that all have it do agree."""
    return torch.equal(a, b) or (a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def _join_slices(tensors: dict[str, Tensor], slices: Mapping[str, PackedSlice | None]) -> dict[str, Tensor]:
    """The tensors by the names of the dense model: the slices of a packed weight become one tensor."""
    names = [name for name, members in group_by_packed(slices).items() if any(member in tensors for member in members)]
    return {name: tensors[name] if name in tensors else assemble(name, slices, tensors) for name in names}


def _assemble_ranks(ranks: list[_RankOutcome], names: Mapping[str, str]) -> Outcome:
    """One outcome of all ranks. `names`: the further names of tied parameters -> their first ones."""
    outcome = Outcome(norm=ranks[0].norm)
    outcome.disagreements = [differing for rank in ranks for differing in rank.disagreements]
    for kind in ranks[0].loss:
        losses = ({"": rank.loss[kind]} for rank in ranks)
        outcome.loss[kind] = _first_copies(outcome, "loss", kind, losses)[""]
    for kind in ranks[0].gradients:
        gradients = (_by_first_name(rank.gradients[kind], names) for rank in ranks)
        outcome.gradients[kind] = _first_copies(outcome, "gradients", kind, gradients)
    weights = (_by_first_name(rank.weights, names) for rank in ranks)
    outcome.weights = _first_copies(outcome, "weights", "", weights)
    own_gradients = (_by_first_name(rank.own_gradients, names) for rank in ranks)
    outcome.own_gradients = _first_copies(outcome, "gradients", OWN_LOSS, own_gradients)
    rows = {rank.dp_rank: rank.logits for rank in ranks if rank.logits is not None}
    outcome.logits = torch.cat([rows[dp_rank] for dp_rank in sorted(rows)]) if rows else None
    return outcome


def _by_first_name(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _first_copies(outcome: Outcome, quantity: str, kind: str, ranks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all ranks, of each the copy of the lowest rank that has it. `outcome.disagreements` gets those of which
    ranks have different copies, such as a replicated weight whose gradient was not reduced."""
    versions: dict[str, list[RankCopy]] = {}
    for rank, tensors in enumerate(ranks):
        for name, tensor in tensors.items():
            same = next((copy for copy in versions.setdefault(name, []) if _equal(copy.tensor, tensor)), None)
            if same is not None:
                same.ranks.append(rank)
            else:
                versions[name].append(RankCopy([rank], None, tensor))
    for name, copies in versions.items():
        if len(copies) > 1:
            outcome.disagreements.append(DifferingCopies(quantity, name, kind, copies))
    return {name: copies[0].tensor for name, copies in versions.items()}
