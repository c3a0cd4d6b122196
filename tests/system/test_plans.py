"""Pipelines, data and tensor parallelism, ZeRO, schedules, recompute and micro-batches together: every pair of their values in
some plan, each plan against the dense model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardcomp
from shardcomp import presets
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.materialize import allocate, weights_of
from shardcomp.policy.patterns import Entry, parse
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.dense_model import Outcome, batches, dense
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.verification.verifier import verify
from shardcomp.weights.initialization import initialize
from support.models import tiny

pytestmark = pytest.mark.usefixtures("chunked_losses")

CHOICES: dict[str, tuple[Any, ...]] = {
    "pipeline": (1, 2, 3, 4),
    "tensor": (1, 2),
    "data": (1, 2, 3),
    "zero": (0, 1, 2, 3),
    "schedule": tuple(SCHEDULES),
    "recompute": ("none", "full", "selective", "every:2"),
    "micro_batches": (1, 2, 4, 5),
    "tied": (False, True),
}
MOST_RANKS = 8
LAYERS = 8
LENGTH = 6


def ranks(plan: dict[str, Any]) -> int:
    return int(plan["pipeline"] * plan["tensor"] * plan["data"])


def legal(plan: dict[str, Any]) -> bool:
    return ranks(plan) <= MOST_RANKS


def covering() -> list[dict[str, Any]]:
    """Plans that have every pair of values which some legal plan has; each of many drawn, the one with the most new pairs."""
    draw = random.Random(0)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(CHOICES, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
        if legal({"pipeline": 1, "tensor": 1, "data": 1} | {a: x, b: y})
    }
    found = []
    while wanted:
        drawn = [{name: draw.choice(values) for name, values in CHOICES.items()} for _ in range(300)]
        ((a, x), (b, y)) = min(wanted, key=str)
        drawn = [plan for each in drawn if legal(plan := {**each, a: x, b: y})]
        best = max(drawn, key=lambda plan: len(pairs(plan) & wanted))
        wanted -= pairs(best)
        found.append(best)
    return found


def pairs(plan: dict[str, Any]) -> set[Any]:
    return {((a, plan[a]), (b, plan[b])) for a, b in itertools.combinations(CHOICES, 2)}


def rows(micro_batches: int, data: int) -> int:
    """Samples of all ranks, so that each has that many micro-batches of two, the last a smaller one where there are several."""
    return data * (2 * micro_batches - (micro_batches > 1))


@cache
def model(tied: bool) -> nn.Module:
    return initialize(presets.build(tiny(num_hidden_layers=LAYERS, tie_word_embeddings=tied)), seed=0)


@cache
def reference(tied: bool, samples: int) -> Outcome:
    return dense(model(tied), "fp64", {"causal": batches(97, samples, LENGTH, 0)["causal"]}, [])


Found = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(loss, norm, gradients) of a rank."""


def policy_of(plan: dict[str, Any]) -> shardcomp.Policy:
    options = {name: value for name, value in plan.items() if name not in ("micro_batches", "tied")}
    return shardcomp.Policy.load("llama", **options, micro_batch=2, precision="fp64")


def step(plan: dict[str, Any], sharded: ShardedModel) -> Found:
    samples, place = rows(plan["micro_batches"], plan["data"]), sharded.mesh.get_local_rank("dp")
    batch = batches(97, samples, LENGTH, 0)["causal"]
    done = sharded.train_step(**{name: held.chunk(plan["data"])[place] for name, held in batch.items()})
    assert not done.skipped
    gradients = {name: full_tensor(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
    return done.loss, sharded.clip_grad_norm_(float("inf")), gradients


def compare(plan: dict[str, Any], found: Iterable[Found]) -> None:
    exact = reference(plan["tied"], rows(plan["micro_batches"], plan["data"]))
    every = float(exact.norm["causal"])
    seen: set[str] = set()
    for loss, norm, gradients in found:
        assert abs(float(loss - exact.loss["causal"])) <= 1e-9 * float(exact.loss["causal"])
        assert abs(float(norm) - every) <= 1e-9 * every
        for name, gradient in gradients.items():
            known = exact.gradients["causal"].get(name, exact.gradients["causal"]["model.embed_tokens.weight"])
            assert float((gradient - known).norm()) <= 1e-9 * max(float(known.norm()), 1e-6 * every), name
        seen |= gradients.keys()
    assert seen >= exact.gradients["causal"].keys()


@pytest.mark.parametrize("plan", covering(), ids=lambda plan: "-".join(str(value) for value in plan.values()))
def test_a_plan_gives_the_loss_and_the_gradients_of_the_dense_model(plan: dict[str, Any]) -> None:
    lowered = shardcomp.lower(model(plan["tied"]), policy_of(plan), ranks(plan), seq=LENGTH)
    weights = weights_of(lowered)
    compare(plan, run_ranks(ranks(plan), lambda rank: step(plan, allocate(lowered, weights))))


def test_every_pair_of_choices_is_covered() -> None:
    plans = covering()
    assert all(legal(plan) for plan in plans) and len(plans) < 60
    both = set().union(*(pairs(plan) for plan in plans))
    assert (("pipeline", 4), ("tensor", 2)) in both and (("schedule", "dualpipev"), ("recompute", "selective")) in both
    assert not any((("pipeline", 4), ("data", 3)) in pairs(plan) for plan in plans)  # twelve ranks


class OtherLabel(nn.Module):
    """A model that ignores the label 5."""

    ignored = 5

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.embed = nn.Embedding(23, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 23, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def scaled(self, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.scaled(self.embed(input_ids))
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        logits = self.head(self.scaled(hidden))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=self.ignored
            )
        return found


class ScaledTwice(OtherLabel):
    """A model with a parameter of its own, beside those of its modules, which the first unit and the last use."""

    ignored = -100

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 1)

    def scaled(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale


UNITS = tuple(Entry(parse(path), word) for path, word in (("embed", "first"), ("layers.*", "layer"), ("head", "last")))


@pytest.mark.parametrize("options", [{"zero": 0}, {"zero": 3}, {"zero": 1, "pipeline": 2}, {"zero": 3, "pipeline": 2}], ids=str)
def test_a_module_has_parameters_of_its_own_beside_those_of_its_children(options: dict[str, Any]) -> None:
    policy = shardcomp.Policy("other", (), UNITS, {"data": 2, "precision": "fp64", **options})
    found = verify(ScaledTwice(), policy, kinds=("causal",))
    assert found.ok, found.worst


def test_what_fills_up_a_micro_batch_has_the_label_that_the_model_ignores() -> None:
    dense_model = OtherLabel()
    policy = shardcomp.Policy("other", (), UNITS, {"pipeline": 2, "micro_batch": 2, "precision": "fp32"})
    lowered = shardcomp.lower(dense_model, policy, 2, seq=4)
    assert lowered.blueprint().ignored_label == 5
    tokens = torch.arange(12).view(3, 4) % 23
    losses = run_ranks(2, lambda rank: allocate(lowered, weights_of(lowered)).train_step(input_ids=tokens, labels=tokens).loss)
    expected = dense_model(input_ids=tokens, labels=tokens)["loss"].detach()
    assert all(abs(float(loss - expected)) < 1e-6 for loss in losses)
