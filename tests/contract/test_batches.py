"""What a batch may be: labels and tokens outside of the vocabulary, ranks with other batches, uneven and empty ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.plans import FLAT, LOSS, PLANS, Batch, assert_gradients, gradients, lowered, make_batch, mine, model, run, usual
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import shardcomp
from shardcomp.runtime.agreement import FIRST_CALLS
from shardcomp.runtime.model import ShardedModel

each_plan = pytest.mark.parametrize("plan", PLANS)


@each_plan
@pytest.mark.parametrize(("key", "value"), [("labels", -1), ("labels", 97), ("input_ids", 97), ("input_ids", -100)])
def test_a_number_outside_of_the_vocabulary_is_named(plan: str, key: str, value: int) -> None:
    batch = make_batch()
    batch[key][1, 5] = value
    good = make_batch()
    expected = gradients(model(), lambda m: m(**good).loss)

    def work(sharded: ShardedModel) -> None:
        named = rf"{key} of sample 1, position 5 is {value}; the model takes 0 to 96"
        other = "another data-parallel rank has a number that the model cannot take"
        mine_is_bad = sharded.mesh.get_local_rank("dp") == 0
        for call in (sharded.train_step, sharded.eval_step):
            with pytest.raises(shardcomp.BatchError, match=named if mine_is_bad else other):
                call(**mine(sharded, batch))
        sharded.train_step(**mine(sharded, good))  # a refused batch leaves everything as it was
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@pytest.mark.parametrize("plan", FLAT)
def test_a_call_without_labels_refuses_such_tokens_too(plan: str) -> None:
    batch = make_batch()["input_ids"]
    batch[:, 3] = 97

    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.BatchError, match="input_ids of sample 0, position 3 is 97"):
            sharded(input_ids=mine(sharded, {"ids": batch})["ids"])

    run(usual(plan), work)


def test_without_waiting_the_step_is_skipped_and_then_refused() -> None:
    """As on an accelerator: the answer is read when the optimizer steps, where the host waits anyway."""
    batch = make_batch()
    bad = {**batch, "labels": batch["labels"].clone()}
    bad["labels"][1, 5] = 96  # inside of the vocabulary: the kernels of a CPU would raise by themselves

    def work(sharded: ShardedModel) -> None:
        sharded._agreement.at_once = False
        optimizer = shardcomp.AdamW(sharded.parameters(), lr=0.1)
        for _ in range(FIRST_CALLS):
            sharded.train_step(**batch)
            assert sharded.optimizer_step(optimizer)
            optimizer.zero_grad()
        before = [p.detach().clone().to_local() for p in sharded.parameters()]
        sharded._blueprint.index_bounds["labels"] = type(sharded._blueprint.index_bounds["labels"])(96, -100)
        step = sharded.train_step(**bad)
        assert bool(step.skipped)
        with pytest.raises(shardcomp.BatchError, match="labels of sample 1, position 5 is 96"):
            sharded.optimizer_step(optimizer)
        assert all(torch.equal(p.detach().to_local(), old) for p, old in zip(sharded.parameters(), before, strict=True))

    run(lowered("tensor 2", model(), (LOSS,)), work)


@pytest.mark.parametrize(("plan", "axis"), [("tensor 2", "tp"), ("pipeline 2", "pp"), ("tensor 2, data 2, zero 3", "tp")])
def test_ranks_of_a_group_with_other_batches_are_refused(plan: str, axis: str) -> None:
    def work(sharded: ShardedModel) -> None:
        rank = sharded.mesh.get_local_rank(axis)
        for seeds, message in (((1, 2), "have other numbers in it"), ((1, 1), "of other shapes")):
            batch = make_batch(seed=seeds[rank], length=8 if message.startswith("have") or rank else 12)
            with pytest.raises(shardcomp.PlanError, match=message):
                sharded.train_step(**mine(sharded, batch))

    run(usual(plan), work)


def test_the_comparison_of_batches_can_be_switched_off() -> None:
    low = lowered("tensor 2", model(), (LOSS,), compare_ranks=False)

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**make_batch(seed=1 + sharded.mesh.get_local_rank("tp")))

    run(low, work)
    assert not [entry for entry in low.report()["collectives"] if entry["where"] == "what ranks compare"]


@pytest.mark.grid
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("rows", [(3, 2), (1, 4), (3, 0)])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_data_parallel_ranks_may_have_uneven_batches(zero: int, rows: tuple[int, int], pipeline: int) -> None:
    batch = make_batch(sum(rows))
    expected = gradients(model(), lambda m: m(**batch).loss)
    low = lowered("one rank", model(), micro_batch=1, data=2, zero=zero, pipeline=pipeline)
    low.for_call(LOSS, (1, 8))

    def work(sharded: ShardedModel) -> Tensor:
        rank = sharded.mesh.get_local_rank("dp")
        part = {name: tensor.split(list(rows))[rank] for name, tensor in batch.items()}
        step = sharded.train_step(**part)
        assert_gradients(sharded, expected)
        assert torch.equal(sharded.eval_step(**part).loss, step.loss)
        return step.loss

    losses = run(low, work)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("rows", [(3, 2), (1, 4)])
def test_without_waiting_uneven_batches_make_as_many_micro_batches(rows: tuple[int, int]) -> None:
    """As on an accelerator, where hosts tell each other over a group of their own how many there are."""
    batch = make_batch(sum(rows))
    expected = gradients(model(), lambda m: m(**batch).loss)
    low = lowered("one rank", model(), micro_batch=1, data=2, zero=2)

    def work(sharded: ShardedModel) -> None:
        sharded._agreement.at_once = False
        sharded._agreement.host = {"dp": sharded._axes["dp"]}
        rank = sharded.mesh.get_local_rank("dp")
        sharded.train_step(**{name: tensor.split(list(rows))[rank] for name, tensor in batch.items()})
        assert_gradients(sharded, expected)

    run(low, work)


class ByRow(LlamaForCausalLM):
    """A model that exports for one shape only: it has as many operators as rows."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        states = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.lm_head(torch.stack([states[i] for i in range(states.shape[0])]))
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=97)
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("plan", ["one rank", "tensor 2", "pipeline 2"])
def test_a_model_of_one_shape_takes_a_smaller_last_micro_batch(plan: str) -> None:
    def dense() -> ByRow:
        found = ByRow(model().config)
        found.load_state_dict(model().state_dict())
        return found

    batch = make_batch(5)
    expected = gradients(dense(), lambda m: m(**batch).loss)
    low = lowered(plan, dense(), micro_batch=2)
    low.for_call(LOSS, (2, 8))

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**batch)
        assert_gradients(sharded, expected)

    run(low, work)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_is_sdpas_and_eager_attention_is_told(implementation: str) -> None:
    """The label of the first token is predicted by a position that sees nothing: only without it do the two agree."""
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :4] = 0
    batch |= {"attention_mask": mask, "labels": torch.where(mask.bool(), batch["input_ids"], -100)}
    if implementation == "eager":
        batch["labels"][0, 4] = -100
    dense = model()
    dense.config._attn_implementation = implementation
    expected = gradients(dense, lambda m: m(**batch).loss)
    call = (tuple((name, 2) for name in sorted(batch)), ("loss",), True)
    low = lowered("tensor 2", dense, (call,))
    padded = shardcomp.lower(dense, low.policy, seq=8, signature=shardcomp.lowering.Signature(*call))
    told = [entry for entry in padded.report()["degraded"] if "sees no key" in entry["why"]]
    assert bool(told) == (implementation == "eager")

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**batch)
        assert_gradients(sharded, expected)

    run(low, work)


def test_samples_that_fill_up_do_not_count_by_shift_labels_either() -> None:
    batch = make_batch(3)
    batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    batch["shift_labels"][0, :4] = -100
    expected = gradients(model(), lambda m: m(**batch).loss)
    low = lowered("pipeline 2", model(), micro_batch=2)
    low.for_call((tuple((name, 2) for name in sorted(batch)), ("loss",), True), (2, 8))

    def work(sharded: ShardedModel) -> None:
        step = sharded.train_step(**batch)
        assert int(step.tokens) == int((batch["shift_labels"] != -100).sum())
        assert_gradients(sharded, expected)

    run(low, work)


@each_plan
def test_integers_of_any_width_and_arguments_without_a_value_are_taken(plan: str) -> None:
    batch = make_batch()
    expected = gradients(model(), lambda m: m(**batch).loss)
    narrow = {"input_ids": batch["input_ids"].to(torch.uint8), "labels": batch["labels"].to(torch.int32)}

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**mine(sharded, narrow), attention_mask=None, use_cache=False)
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@pytest.mark.parametrize("plan", FLAT)
def test_inputs_may_be_given_by_position(plan: str) -> None:
    batch = make_batch()

    def work(sharded: ShardedModel) -> None:
        part: Batch = mine(sharded, batch)
        by_name = sharded(**part).loss
        assert torch.equal(sharded(part["input_ids"], None, labels=part["labels"]).loss, by_name)

    run(usual(plan), work)


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        ((), {"input_ids": torch.zeros(8, dtype=torch.int64)}, r"input_ids has the shape \[8\]: inputs are \[b, s\]"),
        ((), {"labels": torch.zeros(4, 8)}, "labels is torch.float32: tokens and labels are integers"),
        ((), {"input_ids": [[1, 2]]}, "input_ids is list: inputs must be tensors"),
        ((), {"use_cache": True}, "use_cache = True: calls are captured with use_cache = False"),
        ((), {"labels": torch.zeros(2, 8, dtype=torch.int64)}, "inputs of one call share batch and length"),
        ((torch.zeros(4, 8, dtype=torch.int64),), {}, "input_ids is given by position and by name"),
        ((None,) * 40, {}, "40 positional arguments; the model takes "),
    ],
)
def test_other_inputs_are_refused_with_what_would_do(args: Any, changes: dict[str, Any], message: str) -> None:
    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.PlanError, match=message):
            sharded(*args, **{**make_batch(), **changes})

    run(usual("one rank"), work)
