"""A loss of the user's own, made of any output: `.backward()` leaves the dense model's gradients, summed over dp."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from contract.plans import BOTH, FLAT, LOGITS, assert_gradients, gradients, lowered, make_batch, mine, model, run, usual
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import shardcomp
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel

each_plan = pytest.mark.parametrize("plan", FLAT)


def own(logits: Tensor, labels: Tensor) -> Tensor:
    """A sum over samples, so that summing over dp makes it that of the whole batch: cross entropy and a z-loss."""
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    return (0.1 * torch.logsumexp(logits, -1) ** 2).sum() - log_probs.sum()


@each_plan
def test_a_loss_of_the_logits_alone_has_the_dense_gradients(plan: str) -> None:
    batch = make_batch()["input_ids"]
    expected = gradients(model(), lambda dense: own(dense(input_ids=batch).logits, batch))

    def work(sharded: ShardedModel) -> None:
        ids = mine(sharded, {"ids": batch})["ids"]
        own(sharded(input_ids=ids).logits.full_tensor(), ids).backward()
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_a_term_of_the_logits_adds_to_the_models_own_loss(plan: str) -> None:
    batch = make_batch()

    def total(dense: nn.Module) -> Tensor:
        out = dense(**batch)
        return out.loss + 0.01 * own(out.logits, batch["input_ids"])

    expected = gradients(model(), total)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        out = sharded(**part, return_logits="whole")
        assert not isinstance(out.logits, DTensor)
        (out.loss + 0.01 * own(out.logits, part["input_ids"])).backward()
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_two_calls_and_one_backward_pass(plan: str) -> None:
    """Preference losses: the log-probabilities of two samples, compared."""
    chosen, rejected = make_batch(seed=1)["input_ids"], make_batch(seed=2)["input_ids"]

    def scores(logits: Tensor, ids: Tensor) -> Tensor:
        return shardcomp.token_log_probs(logits[:, :-1], ids[:, 1:]).sum(-1)

    def dense_loss(dense: nn.Module) -> Tensor:
        found = [
            torch.log_softmax(dense(input_ids=ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)
            for ids in (chosen, rejected)
        ]
        return -torch.nn.functional.logsigmoid(0.1 * (found[0] - found[1])).sum()

    expected = gradients(model(), dense_loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, {"chosen": chosen, "rejected": rejected})
        found = [scores(sharded(input_ids=ids).logits, ids) for ids in (part["chosen"], part["rejected"])]
        (-torch.nn.functional.logsigmoid(0.1 * (found[0] - found[1])).sum()).backward()
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_backward_passes_and_steps_add_up_in_any_order(plan: str) -> None:
    first, second = make_batch(seed=1), make_batch(seed=2)
    expected = gradients(
        model(), lambda dense: 2 * own(dense(input_ids=first["input_ids"]).logits, first["input_ids"]) + dense(**second).loss
    )

    def work(sharded: ShardedModel) -> None:
        ids = mine(sharded, first)["input_ids"]
        loss = own(sharded(input_ids=ids).logits.full_tensor(), ids)
        loss.backward(retain_graph=True)
        loss.backward()
        sharded.train_step(**mine(sharded, second))
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_a_gradient_that_is_not_finite_is_not_stepped_over(plan: str) -> None:
    batch = make_batch()
    expected = gradients(model(), lambda dense: dense(**batch).loss)

    def work(sharded: ShardedModel) -> None:
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
        before = [full_tensor(p.detach()).clone() for p in sharded.parameters()]
        logits = sharded(input_ids=mine(sharded, batch)["input_ids"]).logits.full_tensor()
        (logits.mean() * float("inf")).backward()
        assert not sharded.optimizer_step(optimizer) and sharded.skipped_steps == 1
        assert all(torch.equal(full_tensor(p.detach()), old) for p, old in zip(sharded.parameters(), before, strict=True))
        optimizer.zero_grad()
        sharded.train_step(**mine(sharded, batch))  # nothing of the backward before is left
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_a_backward_that_raises_leaves_nothing_behind(plan: str) -> None:
    batch = make_batch()
    expected = gradients(model(), lambda dense: dense(**batch).loss)

    def work(sharded: ShardedModel) -> None:
        def stumble(gradient: Tensor) -> Tensor:
            raise ZeroDivisionError("a hook of the user's")

        part = mine(sharded, batch)
        sharded.train_step(**part)
        # Autograd goes back from what was made last: this node's turn comes when the pass through the model is under way.
        early = torch.ones((), dtype=torch.float64, requires_grad=True) * 1.0
        early.register_hook(stumble)
        loss = own(sharded(input_ids=part["input_ids"]).logits.full_tensor(), part["input_ids"]) * early
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        assert sharded._passes._pass is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sharded.zero_grad()
        sharded.train_step(**part)
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_logits_may_be_written_in_place(plan: str) -> None:
    batch = make_batch()["input_ids"]
    expected = gradients(model(), lambda dense: own(dense(input_ids=batch).logits / 0.7, batch))

    def work(sharded: ShardedModel) -> None:
        ids = mine(sharded, {"ids": batch})["ids"]
        logits = sharded(input_ids=ids).logits
        logits /= 0.7
        own(logits.full_tensor(), ids).backward()
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_logits_written_in_place_after_they_were_read_are_an_error(plan: str) -> None:
    """As torch has it for plain tensors: what was read is saved for the backward."""
    batch = make_batch()
    expected = gradients(model(), lambda m: m(**batch).loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        for which in ("the model's own loss", "log-probabilities"):
            out = sharded(**part, return_logits=True)
            log_probs = shardcomp.token_log_probs(out.logits, part["input_ids"])
            out.logits.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (out.loss if which.startswith("the model") else log_probs.sum()).backward()
            sharded.zero_grad()
        out = sharded(**part, return_logits="whole")
        out.logits.mul_(2)  # gathered: a copy, where there is something to gather
        if sharded.mesh["tp"].size() > 1:
            out.loss.backward()
            assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_split_logits_and_plain_terms_meet_in_one_loss(plan: str) -> None:
    batch = make_batch()
    ids = batch["input_ids"]

    def total(out: object, ids: Tensor, log_probs: Tensor) -> Tensor:
        logits = out.logits  # type: ignore[attr-defined]
        return out.loss + 0.01 * torch.logsumexp(logits, -1).square().sum() - 0.1 * log_probs.sum()  # type: ignore[attr-defined]

    def dense_loss(m: nn.Module) -> Tensor:
        out = m(**batch)
        return total(out, ids, torch.log_softmax(out.logits, -1).gather(-1, ids[..., None]))

    expected = gradients(model(), dense_loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        out = sharded(**part, return_logits=True)
        loss = total(out, part["input_ids"], shardcomp.token_log_probs(out.logits, part["input_ids"]))
        loss.backward()
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@each_plan
def test_weights_changed_between_a_call_and_its_backward_are_refused(plan: str) -> None:
    batch = make_batch()

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        for change in (shardcomp.AdamW, torch.optim.SGD):
            late = sharded(**part).loss
            sharded.train_step(**part)
            sharded.optimizer_step(change(sharded.parameters(), lr=0.1))
            with pytest.raises(shardcomp.PlanError, match="weights were changed between a call and its backward"):
                late.backward()
            sharded.zero_grad()
        loss = sharded(**part).loss
        sharded.eval_step(**part)
        loss.backward()  # what changes no weight may come between
        assert all(p.grad is not None for p in sharded.parameters())

    run(usual(plan), work)


@each_plan
def test_outputs_are_freed_when_nobody_holds_them(plan: str) -> None:
    """Without the garbage collector: logits are large."""

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, make_batch())
        gc.collect()
        gc.disable()
        try:
            for call in ({"input_ids": part["input_ids"]}, part):
                out = sharded(**call, return_logits=True)
                logits = weakref.ref(out.logits)
                loss = shardcomp.token_log_probs(out.logits, part["input_ids"]).sum()
                loss.backward()
                assert logits() is not None
                del out, loss
                assert logits() is None
        finally:
            gc.enable()

    run(usual(plan), work)


def test_return_logits_is_true_false_or_whole() -> None:
    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.PlanError, match='return_logits = .full.: use True, False, or "whole"'):
            sharded(**make_batch(), return_logits="full")

    run(usual("one rank"), work)


@pytest.mark.parametrize("plan", ["one rank", "tensor 2", "data 2, zero 0"])
def test_the_loss_scale_of_fp16_is_on_every_output(plan: str) -> None:
    batch, dense = make_batch(), model()
    expected = gradients(dense, lambda m: (out := m(**batch)).loss + 0.1 * own(out.logits, batch["input_ids"]))
    alone = gradients(dense, lambda m: m(**batch).loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        out = sharded(**part, return_logits=True)
        (out.loss + 0.1 * own(out.logits.full_tensor().float(), part["input_ids"])).backward()
        found = {name: full_tensor(p.grad).double() for name, p in sharded.named_parameters()}
        flat = torch.cat([found[name].flatten() for name in expected])
        whole_loss, model_loss = (torch.cat([g[name].flatten() for name in expected]) for g in (expected, alone))
        assert (flat - whole_loss).norm() < 0.01 * whole_loss.norm() < 0.1 * (whole_loss - model_loss).norm()

    run(lowered(plan, dense, (BOTH, LOGITS), precision="fp16"), work)


@each_plan
def test_logits_answer_the_same_questions_under_every_plan(plan: str) -> None:
    batch = make_batch()

    def work(sharded: ShardedModel) -> None:
        with torch.no_grad():
            ids = mine(sharded, batch)["input_ids"]
            split, gathered = (sharded(input_ids=ids, return_logits=how).logits for how in (False, "whole"))
        assert isinstance(split, DTensor) == (sharded.mesh["tp"].size() > 1)
        assert split.shape == gathered.shape == (len(ids), 8, 97)
        assert torch.equal(split.full_tensor(), gathered) and torch.equal(gathered.full_tensor(), gathered)
        assert type(gathered * 1) is Tensor

    run(usual(plan), work)


def test_log_probs_refuse_labels_outside_of_the_vocabulary() -> None:
    with pytest.raises(shardcomp.BatchError, match="a label is 97; the logits have the columns 0 to 96"):
        shardcomp.token_log_probs(torch.zeros(1, 2, 97), torch.tensor([[3, 97]]))
