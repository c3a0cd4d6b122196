"""Every kind of model under the policy that is derived from it: equal to the dense model, with as few messages as can be. The
shipped policies are no worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

import shardcomp
from shardcomp.materialize import allocate, weights_of
from shardcomp.verification.thread_ranks import run_ranks
from support.families import GATE, families, tiny_config
from support.selection import LONG

pytestmark = pytest.mark.usefixtures("chunked_losses")

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
ONE_OR_TWO = {"bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "cohere", "granite", "opt", "phi3", "qwen2", "stablelm"}
PARALLEL = {"cohere", "falcon", "gpt_neox"}
"""Attention and MLP stand beside each other: one reduction a layer."""


TOPOLOGIES = [(2, True), (4, False)] if not LONG else [(2, True), (2, False), (4, True), (4, False)]


@pytest.mark.grid
@pytest.mark.parametrize(("tensor", "sequence_parallel"), TOPOLOGIES)
@pytest.mark.parametrize("kind", families() if LONG else GATE)
def test_auto_agrees_with_the_dense_model(kind: str, tensor: int, sequence_parallel: bool) -> None:
    chosen = shardcomp.Policy.load("auto", tensor=tensor, sequence_parallel=sequence_parallel, precision="fp64")
    found = shardcomp.verify(tiny_config(kind), chosen, shrink={"none": True}, kinds=("causal", "padded"), mutate=LONG)
    assert found.ok, (found.worst, found.mutants)


@pytest.mark.skipif(not hasattr(PretrainedConfig, "_experts_implementation"), reason="its experts cannot be exported")
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_experts_whose_product_takes_no_float64_agree(precision: str) -> None:
    chosen = shardcomp.Policy.load("auto", tensor=2, precision=precision)
    config = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    degraded = shardcomp.lower(config, chosen, seq=16).program.degraded
    assert ["experts"] * (precision == "fp64") == [each.what for each in degraded]
    found = shardcomp.verify(config, chosen, shrink={"none": True}, kinds=("causal",))
    assert found.ok, found.worst


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(2, True), (4, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_policy_sends_no_more_than_auto_and_splits_no_less(family: str, tensor: int, sequence_parallel: bool) -> None:
    options = {"tensor": tensor, "sequence_parallel": sequence_parallel}
    mine, auto = (
        shardcomp.lower(tiny_config(family), shardcomp.Policy.load(name, **options), seq=16).report()
        for name in (FAMILIES[family], "auto")
    )
    for of in (sent, held):
        assert of(mine) <= of(auto)


def sent(report: dict[str, Any]) -> int:
    return sum(message["bytes"] for message in report["collectives"])


def held(report: dict[str, Any]) -> int:
    return report["memory"]["parameters"]


def reductions(family: str, **options: Any) -> int:
    chosen = shardcomp.Policy.load(FAMILIES[family], tensor=2, sequence_parallel=False, **options)
    sent = shardcomp.lower(tiny_config(family), chosen, seq=16).report()["collectives"]
    return sum(m["count"] for m in sent if m["where"].endswith(".0") and (m["op"], m["phase"]) == ("all_reduce", "forward"))


@pytest.mark.parametrize("family", sorted(ONE_OR_TWO))
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
