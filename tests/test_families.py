"""The shipped policies, each on a small model of its family: equal to the dense model, and as few messages as can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_config

import shardcomp
from shardcomp.ranks import run_ranks
from shardcomp.sharding import allocate, weights_of

FAMILIES = {
    "bloom": "bloom",
    "cohere": "cohere",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neox": "gpt_neox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "olmo2": "olmo2",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
}
"""model_type -> policy."""
PARALLEL = {"cohere", "gpt_neox"}
"""Attention and MLP stand beside each other: one reduction a layer."""


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(2, True), (4, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_policy_agrees_with_the_dense_model(family: str, tensor: int, sequence_parallel: bool) -> None:
    chosen = shardcomp.Policy.load(FAMILIES[family], tensor=tensor, sequence_parallel=sequence_parallel, precision="fp64")
    found = shardcomp.verify(tiny_config(family), chosen, shrink={"none": True}, kinds=("causal", "padded"))
    assert found.ok, found.worst


def reductions(family: str, **options: Any) -> int:
    chosen = shardcomp.Policy.load(FAMILIES[family], tensor=2, sequence_parallel=False, **options)
    sent = shardcomp.lower(tiny_config(family), chosen, seq=16).report()["collectives"]
    return sum(m["count"] for m in sent if m["where"].endswith(".0") and (m["op"], m["phase"]) == ("all_reduce", "forward"))


@pytest.mark.parametrize("family", ["cohere", "gpt2", "gpt_neox", "granite", "opt", "phi3", "qwen2", "stablelm"])
def test_a_layer_pays_one_reduction_for_each_branch_that_stands_alone(family: str) -> None:
    assert reductions(family) == (1 if family in PARALLEL else 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_finds_the_policy_of_its_family(model_type: str) -> None:
    assert shardcomp.Policy.for_model(model_type).name == FAMILIES[model_type]


@pytest.mark.parametrize(("family", "expected"), [("gpt2", "qkv"), ("phi3", "qkv")])
def test_a_packed_weight_is_parts_that_are_saved_and_read_as_one(family: str, expected: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family)).float()
    model.save_pretrained(tmp_path / "dense")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(family))
    chosen = shardcomp.Policy.load(FAMILIES[family], tensor=2, precision="fp32")
    lowered = shardcomp.lower(empty, chosen, 2, seq=8)
    names = {name.rpartition(".")[2] for name, p in lowered.program.parameters.items() if p.part is not None}
    assert set(expected) <= names <= {*expected, "gate", "up"}

    def work(rank: int) -> None:
        allocate(lowered, weights_of(lowered, tmp_path / "dense")).save_pretrained(tmp_path / "sharded")

    run_ranks(2, work)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    for name, held in model.state_dict().items():
        assert torch.equal(again[name], held), name
