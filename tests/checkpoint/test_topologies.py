"""A run goes on under any other plan, with the same batches and, within rounding, the same numbers."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.legs import Leg, close, lowered_for, same, train

from shardcomp.lowered import Lowered
from support.families import tiny_config
from support.models import tiny
from support.selection import LONG

CHAIN: list[dict[str, Any]] = [
    {"tensor": 2, "data": 2},
    {"pipeline": 2, "tensor": 2},
    {"data": 4, "zero": 3},
    {},
    {"pipeline": 3},
]
PLANS: list[dict[str, Any]] = [
    *CHAIN,
    {"tensor": 4, "data": 2, "zero": 3},
    {"tensor": 2, "data": 3, "zero": 2, "sequence_parallel": False},
    {"pipeline": 2, "data": 2, "zero": 3, "schedule": "zero_bubble"},
    {"pipeline": 2, "tensor": 2, "data": 2, "zero": 1, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zbv", "recompute": "full"},
    {"pipeline": 2, "data": 2, "schedule": "dualpipev", "zero": 2},
    {"pipeline": 4, "schedule": "gpipe"},
    {"data": 4, "zero": 2, "replicate": 2},
    {"data": 2, "zero": 3, "offload": "all", "recompute": "selective"},
]
CONFIG = {tied: tiny(num_hidden_layers=4, tie_word_embeddings=tied, num_attention_heads=4) for tied in (False, True)}


@cache
def lowered(tied: bool, plan: int) -> Lowered:
    return lowered_for(CONFIG[tied], **PLANS[plan])


@cache
def uninterrupted(tied: bool, steps: int) -> Leg:
    return train(lowered(tied, PLANS.index({})), steps)


@pytest.mark.parametrize("tied", [False, True] if LONG else [True])
@pytest.mark.long  # the drawn pairs below go from one topology to another
def test_a_run_goes_through_five_topologies(tied: bool, tmp_path: Path) -> None:
    whole = uninterrupted(tied, len(CHAIN) + 1)
    load, losses, digests = None, [], []
    for number in range(len(CHAIN)):
        save = tmp_path / f"step-{number + 1}"
        leg = train(lowered(tied, number), number + 1, load=load, save=save)
        losses, digests, load = losses + leg.losses, digests + leg.digests, save
    close(train(lowered(tied, PLANS.index({})), len(CHAIN) + 1, load=load), whole)
    assert digests == whole.digests[:-1]
    for loss, exact in zip(losses, whole.losses, strict=False):
        assert abs(loss - exact) <= 1e-9 * abs(exact)


@pytest.mark.parametrize("number", range(20 if LONG else 6))
def test_drawn_pairs_of_topologies(number: int, tmp_path: Path) -> None:
    before, after = random.Random(None if LONG else number).sample(range(len(PLANS)), 2)
    print(f"from {PLANS[before]} to {PLANS[after]}")
    tied = (before + after) % 2 == 1
    train(lowered(tied, before), 2, save=tmp_path / "step-2")
    found = train(lowered(tied, after), 4, load=tmp_path)
    close(found, uninterrupted(tied, 4))
    assert found.restored is not None
    assert found.restored.random == (lowered(tied, before).mesh == lowered(tied, after).mesh)


@pytest.mark.parametrize("plan", range(len(PLANS)) if LONG else [3, 5, 8])
def test_the_same_topology_goes_on_bit_for_bit(plan: int, tmp_path: Path) -> None:
    train(lowered(True, plan), 2, save=tmp_path / "step-2")
    found = train(lowered(True, plan), 4, load=tmp_path)
    same(found, train(lowered(True, plan), 4))
    assert found.restored is not None and found.restored.random


@pytest.mark.grid
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("phi3", {"tensor": 2}, {}),
        ("phi3", {}, {"tensor": 2, "data": 2, "zero": 3}),
        ("gpt2", {"tensor": 4}, {"pipeline": 2, "tensor": 2}),
        ("falcon", {"tensor": 4}, {"data": 2, "zero": 3}),
        ("gpt_neox", {"tensor": 2, "data": 2, "zero": 3}, {"tensor": 4}),
        ("falcon_new", {}, {"tensor": 4}),
    ],
)
def test_packed_weights_are_cut_anew(kind: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(kind, vocab_size=97)
    train(lowered_for(config, "auto", **before), 2, save=tmp_path / "step-2")
    found = train(lowered_for(config, "auto", **after), 4, load=tmp_path)
    whole = train(lowered_for(config, "auto", **after), 4)
    for loss, exact in zip(found.losses, whole.losses[2:], strict=True):
        assert abs(loss - exact) <= 1e-9 * abs(exact)


@pytest.mark.grid
@pytest.mark.parametrize(("before", "after"), [("fp64", "fp32"), ("fp32", "bf16"), ("bf16", "fp64")])
def test_states_are_loaded_in_another_precision(before: str, after: str, tmp_path: Path) -> None:
    train(lowered_for(CONFIG[True], precision=before, tensor=2), 2, save=tmp_path / "step-2")
    saved = train(lowered_for(CONFIG[True], precision=before), 2, load=tmp_path).weights
    found = train(lowered_for(CONFIG[True], precision=after, data=2, zero=3), 2, load=tmp_path).weights
    for name, held in found.items():
        assert torch.equal(held, saved[name].to(held.dtype)), name
    train(lowered_for(CONFIG[True], precision=after, data=2, zero=3), 3, load=tmp_path)


@pytest.mark.long  # generators are saved and loaded in test_run_state.py
def test_dropout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config("gpt2", vocab_size=97, resid_pdrop=0.2, attn_pdrop=0.1)
    dropping = lowered_for(config, "gpt2", tensor=2, data=2, zero=1)
    train(dropping, 2, save=tmp_path / "step-2")
    whole = train(dropping, 4)
    same(train(dropping, 4, load=tmp_path), whole)
    other = train(lowered_for(config, "gpt2", data=2), 4, load=tmp_path)
    assert other.losses != whole.losses[2:]
