"""Listings of a LLaMA under a few plans. A change of listing is a reviewed change: run pytest --update-golden and read
the diff."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import shardcomp
from support.models import tiny

PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one_rank": ({"tensor": 1}, {}),
    "tensor_2": ({"tensor": 2, "sequence_parallel": False}, {}),
    "tensor_2_sequence_parallel": ({"tensor": 2}, {}),
    "tensor_2_tied_biases": ({"tensor": 2}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
}


PINNED = dict(
    line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines() if "==" in line
)
pinned = pytest.mark.skipif(
    transformers.__version__ != PINNED["transformers"] or torch.__version__.partition("+")[0] != PINNED["torch"],
    reason="the golden listings are those of the versions in constraints.txt",
)


@pinned
@pytest.mark.parametrize("plan", PLANS)
def test_the_listing_is_the_reviewed_one(plan: str, golden: Callable[[str, str], None]) -> None:
    options, changes = PLANS[plan]
    lowered = shardcomp.lower(tiny(num_hidden_layers=3, **changes), shardcomp.Policy.load("llama", **options), seq=16)
    golden(f"{plan}.py.txt", lowered.listing())


@pinned
def test_the_listing_of_a_later_stage_is_the_reviewed_one(golden: Callable[[str, str], None]) -> None:
    policy = shardcomp.Policy.load("llama", tensor=2, pipeline=2)
    golden("pipeline_2_last_stage.py.txt", shardcomp.lower(tiny(num_hidden_layers=6), policy, seq=16).listing(rank=2))


def test_the_listing_does_not_change_from_run_to_run() -> None:
    policy = shardcomp.Policy.load("llama", tensor=2)
    assert shardcomp.lower(tiny(), policy, seq=16).listing() == shardcomp.lower(tiny(), policy, seq=16).listing()


def test_depth_costs_no_code() -> None:
    policy = shardcomp.Policy.load("llama", tensor=2)
    few, many = (shardcomp.lower(tiny(num_hidden_layers=n), policy, seq=16) for n in (3, 9))
    assert len(few.program.bodies()) == len(many.program.bodies()) == 3
    assert len(few.listing().splitlines()) == len(many.listing().splitlines())
