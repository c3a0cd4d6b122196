"""What users save and list from a pipeline whose parameters are in pieces over every axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import shardcomp
from shardcomp import presets
from shardcomp.materialize import allocate, weights_of
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.families import tiny_config
from support.models import tiny

PLAN: dict[str, Any] = {"pipeline": 2, "tensor": 2, "data": 2, "zero": 3, "precision": "fp32", "micro_batch": 1}

MODELS: dict[str, Any] = {
    "tied": tiny(tie_word_embeddings=True, num_hidden_layers=4),
    "untied": tiny(num_hidden_layers=4),
    "gpt2": tiny_config("gpt2", n_layer=4),
    "phi3": tiny_config("phi3", num_hidden_layers=4),
}


def lowered_for(kind: str, model: torch.nn.Module, **options: Any) -> Any:
    name = "llama" if kind in ("tied", "untied") else kind
    return shardcomp.lower(model, shardcomp.Policy.load(name, **{**PLAN, **options}), seq=8)


@pytest.mark.parametrize(
    ("kind", "trained"), [("tied", False), ("tied", True), ("untied", True), ("gpt2", False), ("phi3", True)]
)
def test_what_is_saved_from_every_axis_at_once_is_read_by_transformers_and_back(
    tmp_path: Path, kind: str, trained: bool
) -> None:
    model = initialize(presets.build(MODELS[kind]), 7)
    lowered = lowered_for(kind, model)
    batch = batches(97, 4, 8, 0)["causal"]

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        mine = {n: held.chunk(2)[sharded.mesh.get_local_rank("dp")] for n, held in batch.items()}
        if trained:  # parameters stand as a step leaves them
            sharded.train_step(**mine)
        sharded.save_pretrained(tmp_path / "saved", max_shard_size=40_000)

    run_ranks(8, work)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, held in model.state_dict().items():
        assert torch.equal(state[name], held), name

    empty = presets.build(MODELS[kind])
    other = lowered_for(kind, empty, schedule="zbv", zero=1)
    weights = weights_of(other, tmp_path / "saved")
    run_ranks(8, lambda rank: allocate(other, weights).save_pretrained(tmp_path / "again"))
    for name, held in AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).state_dict().items():
        assert torch.equal(state[name], held), name


def test_parameters_of_a_stage_have_huggingfaces_names_and_frozen_ones_stay() -> None:
    model = initialize(presets.build(tiny(tie_word_embeddings=True)), 0)
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" not in name)
    lowered = lowered_for("tied", model)
    batch = batches(97, 4, 8, 0)["causal"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def work(rank: int) -> tuple[set[str], int]:
        sharded = allocate(lowered, weights_of(lowered))
        before = {name: p.to_local().clone() for name, p in sharded.named_parameters()}
        optimizer = shardcomp.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
        sharded.train_step(**{n: held.chunk(2)[sharded.mesh.get_local_rank("dp")] for n, held in batch.items()})
        assert sharded.clip_grad_norm_(1.0) > 0 and sharded.optimizer_step(optimizer)
        for name, p in sharded.named_parameters():
            assert isinstance(p, DTensor) and tuple(p.shape) == shapes[name]
            assert p.requires_grad == ("mlp" not in name) and (p.grad is not None) == p.requires_grad
            assert torch.equal(p.to_local(), before[name]) == (not p.requires_grad or not p.to_local().numel()), name
        held = sharded.state_dict()
        assert held.keys() == before.keys()
        return set(before), sharded.mesh.get_local_rank("pp")

    found = run_ranks(8, work)
    stages = [set().union(*(names for names, stage in found if stage == at)) for at in (0, 1)]
    assert stages[0] | stages[1] == set(shapes)
    assert stages[0] & stages[1] == {"model.embed_tokens.weight"}  # each of the two stages that use it has a copy
