"""Parameters that no call uses: held, saved, left alone by the optimizer, and said in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.legs import train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import shardcomp
from shardcomp.errors import PlanError
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime import Blueprint, build
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny, with_idle

IDLE = [f"{at}.{leaf}" for at in ("spare", "model.layers.1.spare", "model.layers.3.spare") for leaf in ("weight", "bias")]
PLANS: list[dict[str, Any]] = [
    {"tensor": 2, "zero": 0},
    {"data": 3, "zero": 1},
    {"data": 2, "tensor": 2, "zero": 3},
    {"data": 2, "pipeline": 2, "zero": 3, "schedule": "zero_bubble"},
    {"data": 2, "pipeline": 2, "zero": 2, "schedule": "zbv"},
]


def lowered_for(model: Any = None, **options: Any) -> Lowered:
    policy = shardcomp.Policy.load("auto", **{"precision": "fp64", "micro_batch": 2, **options})
    return shardcomp.lower(model or with_idle(), policy, seq=8)


@pytest.mark.parametrize("options", PLANS[1:4], ids=str)
def test_a_plan_agrees_with_a_model_that_has_them(options: dict[str, Any]) -> None:
    found = shardcomp.verify(
        with_idle(), shardcomp.Policy.load("auto", precision="fp64", **options), kinds=("causal", "padded")
    )
    assert found.ok, found.worst


@pytest.mark.parametrize("options", PLANS, ids=str)
def test_they_get_no_gradient_and_are_saved_as_they_were(options: dict[str, Any], tmp_path: Path) -> None:
    model = with_idle()
    lowered = lowered_for(model, **options)
    weights = weights_of(lowered)
    tokens = torch.arange(48).view(6, 8)

    def work(rank: int) -> set[str]:
        sharded = allocate(lowered, weights)
        optimizer = shardcomp.AdamW(sharded.parameters(), weight_decay=0.5)
        sharded.train_step(input_ids=tokens, labels=tokens)
        assert sharded.clip_grad_norm_(1.0) > 0 and sharded.optimizer_step(optimizer)
        without = {name for name, p in sharded.named_parameters() if p.grad is None}
        sharded.save_pretrained(tmp_path)
        return without

    assert set().union(*run_ranks(lowered.mesh.world_size, work)) == set(IDLE)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert {name for name, p in model.named_parameters() if torch.equal(saved[name], p)} == set(IDLE)


@pytest.mark.long  # checkpoint/test_topologies.py resumes under other plans
def test_a_checkpoint_goes_on_under_another_plan(tmp_path: Path) -> None:
    whole = train(lowered_for(**PLANS[2]), 4)
    train(lowered_for(**PLANS[2]), 2, save=tmp_path / "step-2")
    after = train(lowered_for(**PLANS[3]), 4, load=tmp_path)
    assert after.losses == pytest.approx(whole.losses[2:], rel=1e-9)
    for name, held in with_idle().named_parameters():
        assert torch.allclose(after.weights[name], whole.weights[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(after.weights[name], held.double()) == (name in IDLE)


def test_the_report_names_them() -> None:
    [said] = [each for each in lowered_for(tensor=2).report()["degraded"] if "not used" in each["what"]]
    assert said == {
        "what": f"not used by this call: {', '.join(IDLE[2:])} and 2 more",
        "why": "held and saved, without a gradient",
    }


class Extra(LlamaForCausalLM):
    """Takes two inputs that bring parameters in: in front of the layers, and behind them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kinds = nn.Embedding(4, config.hidden_size)
        self.scale = nn.Linear(1, 1)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Any:
        embedded = self.model.embed_tokens(input_ids)
        if token_type_ids is not None:
            embedded = embedded + self.kinds(token_type_ids)
        out = super().forward(inputs_embeds=embedded, **more)
        if position_ids is not None:
            out.logits = out.logits + self.scale(position_ids.unsqueeze(-1).to(out.logits.dtype))
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
        return out


@pytest.mark.parametrize("options", [{"tensor": 2}, {"data": 2, "zero": 3}], ids=str)
def test_another_call_may_use_them_where_they_are(options: dict[str, Any]) -> None:
    model = shardcomp.initialize(Extra(tiny()), 0).double()
    ids = torch.arange(16).view(2, 8)
    loss = model(ids, ids, ids % 4).loss
    loss.backward()
    lowered = lowered_for(model, **options)
    weights = weights_of(lowered)

    def work(rank: int) -> tuple[float, Tensor]:
        sharded = allocate(lowered, weights)
        place = sharded.mesh["dp"]
        mine = ids.chunk(place.size())[place.get_local_rank()]
        sharded.train_step(input_ids=mine, labels=mine)
        assert sharded.kinds.weight.grad is None
        sharded.zero_grad()
        step = sharded.train_step(input_ids=mine, labels=mine, token_type_ids=mine % 4)
        with pytest.raises(PlanError, match=r"position_ids\) -> \(loss\) uses scale.weight in lm_head, a unit that does"):
            sharded.train_step(input_ids=mine, labels=mine, position_ids=mine)
        return float(step.loss), sharded.kinds.weight.grad.full_tensor()

    for found, gradient in run_ranks(2, work):
        assert found == pytest.approx(float(loss.detach()), rel=1e-6)
        assert torch.allclose(gradient, model.kinds.weight.grad, rtol=1e-5, atol=1e-8)


class Training(LlamaForCausalLM):
    """Has a module behind the layers that only training uses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Linear(config.vocab_size, config.vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor, **more: Any) -> Any:
        out = super().forward(input_ids, **more)
        if self.training:
            out.logits = out.logits + self.scale(out.logits)
        out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
        return out


@pytest.mark.parametrize("options", [{"tensor": 2}, {"data": 2, "zero": 3}, {"pipeline": 2}], ids=str)
@pytest.mark.long  # the calls above use more than the first
def test_another_call_may_leave_out_what_the_first_one_uses(options: dict[str, Any]) -> None:
    model = shardcomp.initialize(Training(tiny(vocab_size=96)), 0)
    ids = torch.arange(32).view(4, 8)
    expected = {training: float(model.train(training)(ids, ids).loss.detach()) for training in (True, False)}
    assert abs(expected[True] - expected[False]) > 1e-3
    lowered = lowered_for(model.train(), **{**options, "precision": "fp32"})
    weights = weights_of(lowered)

    def work(rank: int) -> dict[bool, float]:
        sharded = allocate(lowered, weights)
        place = sharded.mesh["dp"]
        mine = ids.chunk(place.size())[place.get_local_rank()]
        found = {True: float(sharded.train_step(input_ids=mine, labels=mine).loss)}
        sharded.eval()
        return {**found, False: float(sharded.eval_step(input_ids=mine, labels=mine).loss)}

    for found in run_ranks(2, work):
        assert found == pytest.approx(expected, rel=1e-5)


def test_another_call_that_needs_a_weight_cut_otherwise_is_refused() -> None:
    lowered = lowered_for(tiny(), tensor=2)
    weights, ids = weights_of(lowered), torch.arange(16).view(2, 8)
    name = "model.layers.0.mlp.down_proj.weight"

    def lower(*call: Any) -> Blueprint:
        other = lowered.for_call(*call)
        return replace(other, parameters={**other.parameters, name: replace(other.parameters[name], split={"tp": 0})})

    def work(rank: int) -> None:
        sharded = build(lowered.blueprint(), weights, lower=lower)
        with pytest.raises(PlanError, match=f"needs {name} in model.layers.0 as"):
            sharded(input_ids=ids)

    run_ranks(2, work)
