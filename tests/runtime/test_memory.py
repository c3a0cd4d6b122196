"""What ranks hold between micro-batches, counted on their own tensors, equals the table in DESIGN; with what the host keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime.live_tensors import Sample, expected, formula, gathered_at_units, samples_of_a_step, unit_bytes

import shardcomp
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny

SCHEDULES = ["1f1b", "interleaved", "zero_bubble", "zbv"]
ROWS = 3


def lowered_for(tied: bool = False, pipeline: int = 1, vocabulary: int = 97, **options: Any) -> Any:
    config = tiny(vocab_size=vocabulary, tie_word_embeddings=tied, num_hidden_layers=4 if pipeline > 1 else 3)
    policy = shardcomp.Policy.load("llama", **{"micro_batch": 1, "precision": "bf16", "pipeline": pipeline, **options})
    return shardcomp.lower(config, policy, seq=8)


def trained(lowered: Any) -> tuple[ShardedModel, shardcomp.AdamW, dict[str, torch.Tensor]]:
    """A model after a step, so that the optimizer has its states; this rank's part of a batch."""
    sharded = allocate(lowered, weights_of(lowered))
    size = sharded.mesh["dp"].size()
    mine = {
        n: held.chunk(size)[sharded.mesh.get_local_rank("dp")] for n, held in batches(96, ROWS * size, 8, 0)["causal"].items()
    }
    optimizer = shardcomp.AdamW(sharded.parameters())
    sharded.train_step(**mine)
    assert sharded.clip_grad_norm_(1.0) > 0 and sharded.optimizer_step(optimizer)
    optimizer.zero_grad()
    return sharded, optimizer, mine


def check(sharded: ShardedModel, samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.held["device"] == expected(sharded, sample.progress), sample.progress
        assert not any(sample.held["host"].values())


@pytest.mark.parametrize("data", [2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_between_micro_batches_a_rank_holds_what_the_table_says(zero: int, data: int) -> None:
    lowered = lowered_for(tied=True, zero=zero, data=data, vocabulary=96)
    numel = sum(p.numel() for p in lowered.model.parameters())
    counters = 4 * len(lowered.program.parameters)  # AdamW's number of steps, for each parameter

    def work(rank: int) -> None:
        sharded, optimizer, mine = trained(lowered)
        samples = samples_of_a_step(sharded, optimizer, mine)
        assert len(samples) == ROWS
        check(sharded, samples)
        for sample in samples:
            wanted = formula(zero, data, reduced=sample is samples[-1])
            assert sample.total() == wanted * numel + counters

    run_ranks(data, work)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_fills_pieces_up_is_counted(zero: int) -> None:
    lowered = lowered_for(zero=zero, data=4)

    def work(rank: int) -> None:
        sharded, optimizer, mine = trained(lowered)
        check(sharded, samples_of_a_step(sharded, optimizer, mine))

    run_ranks(4, work)


@pytest.mark.grid
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.long  # the table holds for other plans
def test_the_table_holds_under_a_pipeline(zero: int, schedule: str) -> None:
    lowered = lowered_for(tied=True, zero=zero, data=2, pipeline=2, schedule=schedule)

    def work(rank: int) -> None:
        sharded, optimizer, mine = trained(lowered)
        samples = samples_of_a_step(sharded, optimizer, mine)
        assert len(samples) >= ROWS * len(sharded._stage_shards)
        check(sharded, samples)

    run_ranks(4, work)


@pytest.mark.parametrize(
    "options",
    [
        {"data": 2},
        {"data": 2, "tied": True},
        {"data": 2, "tied": True, "recompute": "full"},
        {"data": 2, "tied": True, "offload": "all"},
        *({"data": 2, "tied": True, "pipeline": 2, "schedule": schedule} for schedule in SCHEDULES),
    ],
    ids=lambda options: "-".join(str(held) for held in options.values()),
)
def test_under_zero_3_at_most_two_units_are_gathered_at_once(options: dict[str, Any]) -> None:
    lowered = lowered_for(zero=3, **options)

    def work(rank: int) -> tuple[int, int]:
        sharded, _, mine = trained(lowered)
        sizes = sorted(unit_bytes(sharded))
        found = gathered_at_units(sharded, lambda: sharded.train_step(**mine))
        assert sharded.held_bytes()["device"]["gathered"] == 0
        with torch.no_grad():
            found += gathered_at_units(sharded, lambda: sharded.eval_step(**mine))
        assert sharded.held_bytes()["device"]["gathered"] == 0
        return max(found), sum(sizes[-2:])

    for most, two in run_ranks(lowered.mesh.world_size, work):
        assert 0 < most <= two


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 0, "offload": "optimizer", "tied": True},
        {"zero": 1, "offload": "optimizer", "tied": True},
        {"zero": 2, "offload": "optimizer"},
        {"zero": 3, "offload": "optimizer", "tied": True},
        {"zero": 3, "offload": "all", "tied": True},
        {"zero": 1, "offload": "optimizer", "pipeline": 2, "schedule": "zbv", "tied": True},
        {"zero": 3, "offload": "all", "pipeline": 2, "schedule": "zero_bubble"},
    ],
    ids=lambda options: "-".join(str(held) for held in options.values()),
)
def test_what_the_host_keeps_is_not_on_the_device(options: dict[str, Any]) -> None:
    lowered = lowered_for(data=2, **options)

    def work(rank: int) -> None:
        sharded, optimizer, mine = trained(lowered)
        for sample in samples_of_a_step(sharded, optimizer, mine):
            wanted = expected(sharded, sample.progress)
            on_device = ("gathered", "unreduced")
            assert sample.held["device"] == {role: held if role in on_device else 0 for role, held in wanted.items()}
            assert sample.held["host"] == {role: 0 if role in on_device else held for role, held in wanted.items()}

    run_ranks(lowered.mesh.world_size, work)


def test_only_the_units_that_a_pattern_names_are_kept_by_the_host() -> None:
    lowered = lowered_for(tied=True, zero=3, data=2, offload=("model.layers.1", "model.layers.2"))

    def work(rank: int) -> None:
        sharded, optimizer, _ = trained(lowered)
        held = sharded.held_bytes(optimizer)
        every = sum(p.numel() for p in lowered.model.parameters())
        layer = sum(p.numel() for n, p in lowered.model.named_parameters() if n.startswith("model.layers.0."))
        tensors = len(lowered.program.parameters)
        ours = sum(n.startswith(("model.layers.1.", "model.layers.2.")) for n in lowered.program.parameters)
        assert held["host"]["parameters"] == 4 * layer  # half of two layers
        assert held["host"]["optimizer"] == 8 * layer + 4 * ours
        assert held["device"]["optimizer"] <= 8 * (every // 2 - layer + 32) + 4 * (tensors - ours)

    run_ranks(2, work)


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 0, "offload": "optimizer"},
        {"zero": 1, "offload": "optimizer", "tensor": 2},
        {"zero": 2, "offload": "optimizer", "pipeline": 2, "schedule": "zero_bubble"},
        {"zero": 3, "offload": "all", "tensor": 2},
        {"zero": 3, "offload": "model.layers.1"},
        {"zero": 3, "offload": ("model.embed_tokens", "model.layers.0"), "pipeline": 2, "schedule": "zbv"},
    ],
    ids=lambda options: "-".join(str(held) for held in options.values()),
)
def test_what_the_host_keeps_learns_the_same(options: dict[str, Any]) -> None:
    config = tiny(tie_word_embeddings=True, num_hidden_layers=4 if "pipeline" in options else 2)
    policy = shardcomp.Policy.load("llama", **{"precision": "fp64", "data": 2, **options})
    found = shardcomp.verify(config, policy, shrink={"none": True}, kinds=("causal",))
    assert found.ok, found.worst
