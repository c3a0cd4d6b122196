"""`requires_grad` changed after sharding: freezing, and gradual unfreezing."""

from __future__ import annotations

import pytest
from contract.plans import FLAT, LOGITS, LOSS, PLANS, assert_gradients, gradients, lowered, make_batch, mine, model, run
from torch import nn

import shardcomp
from shardcomp.runtime.model import ShardedModel

each_plan = pytest.mark.parametrize("plan", PLANS)
each_pattern = pytest.mark.parametrize("pattern", ["norm", "embed_tokens", "layers.0", ""])
"""What is frozen at first: partial gradients, a split one, what a whole pipeline stage has, everything but the head."""


def is_frozen(name: str, pattern: str) -> bool:
    return pattern in name and not (pattern == "" and name.startswith("lm_head"))


def frozen(pattern: str) -> nn.Module:
    dense = model()
    for name, p in dense.named_parameters():
        p.requires_grad_(not is_frozen(name, pattern))
    return dense


@pytest.mark.grid
@each_plan
@each_pattern
def test_what_is_unfrozen_later_trains(plan: str, pattern: str) -> None:
    batch = make_batch()
    at_first = gradients(frozen(pattern), lambda m: m(**batch).loss)
    expected = gradients(model(), lambda m: m(**batch).loss)
    low = lowered(plan, frozen(pattern), (LOSS,))
    low.for_call(LOSS, (4, 8), frozenset(expected))

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        sharded.train_step(**part)
        assert_gradients(sharded, at_first)
        sharded.zero_grad()
        sharded.requires_grad_(True)
        sharded.train_step(**part)
        assert_gradients(sharded, expected)
        sharded.zero_grad()
        for name, p in sharded.named_parameters():
            p.requires_grad_(not is_frozen(name, pattern))
        sharded.train_step(**part)
        assert_gradients(sharded, at_first)

    run(low, work)


@pytest.mark.parametrize("plan", FLAT)
def test_a_loss_of_ones_own_trains_what_is_unfrozen_later(plan: str) -> None:
    batch = make_batch()["input_ids"]
    expected = gradients(model(), lambda m: (m(input_ids=batch).logits ** 2).sum())
    low = lowered(plan, frozen("norm"), (LOGITS,))
    low.for_call(LOGITS, (4, 8), frozenset(expected))

    def work(sharded: ShardedModel) -> None:
        ids = mine(sharded, {"ids": batch})["ids"]
        for p in sharded.parameters():
            p.requires_grad_(True)
        (sharded(input_ids=ids).logits.full_tensor() ** 2).sum().backward()
        assert_gradients(sharded, expected)

    run(low, work)


@pytest.mark.parametrize("plan", ["data 2, zero 0", "data 2, zero 3"])
def test_data_ranks_that_train_other_parameters_are_refused(plan: str) -> None:
    """Also in a backward of one's own, whose call connects no data-parallel ranks."""
    batch = make_batch()
    low = lowered(plan, frozen("norm"), (LOSS, LOGITS))
    for trained in ("model.norm.weight",):
        names = frozenset(name for name, p in model().named_parameters() if "norm" not in name) | {trained}
        low.for_call(LOGITS, (4, 8), names)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, batch)
        sharded.model.norm.weight.requires_grad_(sharded.mesh.get_local_rank("dp") == 0)
        with pytest.raises(shardcomp.PlanError, match=r"dp rank \d .*have other parameters with requires_grad. Set it alike"):
            sharded.train_step(**part)
        logits = sharded(input_ids=part["input_ids"]).logits
        with pytest.raises(shardcomp.PlanError, match=r"a backward; dp rank \d have other parameters with requires_grad"):
            logits.sum().backward()

    run(low, work)


def test_ranks_that_train_other_parameters_are_refused() -> None:
    low = lowered("tensor 2", frozen("norm"), (LOSS,))

    def work(sharded: ShardedModel) -> None:
        sharded.model.norm.weight.requires_grad_(sharded.mesh.get_local_rank("tp") == 0)
        with pytest.raises(shardcomp.PlanError, match=r"tp rank \d .*have other parameters with requires_grad"):
            sharded.train_step(**make_batch())

    run(low, work)
