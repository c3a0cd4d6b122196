"""How a model is sharded: ranks that built other numbers, the call that is captured first, and what is saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.plans import LOSS, assert_gradients, gradients, lowered, make_batch, mine, model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput

import shardcomp
from shardcomp.lowering import Signature
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.gathering import full_tensor
from shardcomp.verification.thread_ranks import run_alone, run_ranks
from support.models import tiny

DATA = {"data 2, zero 0": ["model.norm.weight", "lm_head.weight"], "data 2, zero 3": [], "tensor 2": ["model.norm.weight"]}
"""Plans, and which of two parameters that ranks drew for themselves lie in copies there."""


def drawn_by(rank: int) -> nn.Module:
    found, draw = model(), torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in (found.lm_head.weight, found.model.norm.weight):
            p.copy_(torch.rand(p.shape, generator=draw))
    return found


def sources(dense: nn.Module) -> Any:
    return lambda name, index: dense.get_parameter(name).detach()[index]


@pytest.mark.parametrize("plan", DATA)
def test_ranks_that_built_other_numbers_are_refused(plan: str) -> None:
    low, models = lowered(plan, model(), (LOSS,)), [drawn_by(rank) for rank in range(2)]

    def work(rank: int) -> None:
        dense = models[rank]
        with pytest.raises(shardcomp.PlanError, match="ranks 0 and 1 have other numbers for model.norm.weight, lm_head.weight"):
            allocate(low, sources(dense), same=list(dense.named_parameters()))

    run_ranks(2, work)


@pytest.mark.parametrize("plan", [plan for plan, copies in DATA.items() if copies])
def test_copies_that_differ_are_refused_wherever_they_came_from(plan: str) -> None:
    low, models = lowered(plan, model(), (LOSS,)), [drawn_by(rank) for rank in range(2)]

    def work(rank: int) -> None:
        with pytest.raises(shardcomp.PlanError, match=f"other numbers for {', '.join(DATA[plan])}") as caught:
            allocate(low, sources(models[rank]))
        assert "sync_weights=True" in str(caught.value)

    run_ranks(2, work)


@pytest.mark.parametrize("plan", DATA)
def test_rank_0s_numbers_are_taken_where_asked_for(plan: str) -> None:
    low, batch = lowered(plan, model(), (LOSS,)), make_batch()
    models = [drawn_by(rank) for rank in range(2)]
    expected = gradients(drawn_by(0), lambda m: m(**batch).loss)

    def work(rank: int) -> None:
        dense = models[rank]
        sharded = allocate(low, sources(dense), same=list(dense.named_parameters()), sync_weights=True)
        assert torch.equal(full_tensor(sharded.lm_head.weight.detach()), models[0].lm_head.weight.double())
        sharded.train_step(**mine(sharded, batch))
        assert_gradients(sharded, expected)

    run_ranks(2, work)


def alone(work: Any) -> Any:
    return run_alone(1, lambda _: work())[0]


class WithTerm(LlamaForCausalLM):
    """A model whose loss has a summand of its own."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, use_cache=False)
        loss = None if labels is None else out.loss + 1e-3 * out.logits.logsumexp(-1).square().mean()
        return CausalLMOutput(loss=loss, logits=out.logits)


def test_a_model_whose_loss_is_not_ours_is_sharded_for_its_logits() -> None:
    dense, batch = WithTerm(tiny()), make_batch()

    def own(out: Any) -> Tensor:
        return out.logits.square().mean()

    expected = gradients(dense, lambda m: own(m(input_ids=batch["input_ids"])))

    def work() -> None:
        with pytest.warns(UserWarning, match="the model's own loss cannot be captured"):
            sharded = shardcomp.shard(dense, shardcomp.Policy.load("llama", precision="fp64"))
        own(sharded(input_ids=batch["input_ids"])).backward()
        assert_gradients(sharded, expected)
        with pytest.raises(shardcomp.CaptureError, match="the loss is not the mean of a cross entropy"):
            sharded.train_step(**batch)

    alone(work)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_reward_model_is_sharded_by_the_call_that_is_named(tensor: int) -> None:
    torch.manual_seed(0)
    dense = LlamaForSequenceClassification(tiny(num_labels=1, pad_token_id=0)).train()
    ids = make_batch()["input_ids"].clamp(min=1)
    ids[:, 6:] = 0  # padding: the score is that of the last token before it
    mask = (ids != 0).long()

    def preferred(logits: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(logits[:2] - logits[2:]).sum()

    call = {"input_ids": ids, "attention_mask": mask}
    expected = gradients(dense, lambda m: preferred(m(**call).logits))
    policy = shardcomp.Policy.load("auto", precision="fp64", tensor=tensor)
    signature = Signature((("attention_mask", 2), ("input_ids", 2)), ("logits",))
    low = shardcomp.lower(dense, policy, seq=8, signature=signature)

    def work(rank: int) -> None:
        sharded = allocate(low, weights_of(low))
        preferred(sharded(**call).logits.full_tensor()).backward()
        assert_gradients(sharded, expected)

    run_ranks(tensor, work)


def test_shard_takes_the_inputs_and_outputs_of_the_first_call() -> None:
    batch = make_batch()
    expected = gradients(model(), lambda m: m(**batch).loss)

    def work() -> None:
        policy = shardcomp.Policy.load("llama", precision="fp64")
        with pytest.raises(shardcomp.PlanError, match="needs inputs="):
            shardcomp.shard(model(), policy, outputs=("loss",))
        names = ("input_ids", "labels", "position_ids")
        sharded = shardcomp.shard(model(), policy, inputs=names, outputs=("loss", "logits"))
        assert sharded.blueprint.inputs == names and sharded.blueprint.outputs == ("loss", "logits")
        out = sharded(**batch, position_ids=torch.arange(8).expand(4, 8))
        assert out.logits is not None
        out.loss.backward()
        assert_gradients(sharded, expected)

    alone(work)


def test_what_ends_a_generation_is_saved_with_the_weights(tmp_path: Path) -> None:
    dense = model()
    dense.generation_config = GenerationConfig(eos_token_id=[5, 7], temperature=0.3, do_sample=True)

    def work() -> None:
        shardcomp.shard(dense, shardcomp.Policy.load("llama", precision="fp32")).save_pretrained(tmp_path / "saved")

    alone(work)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert found.generation_config.eos_token_id == [5, 7] and found.generation_config.temperature == 0.3
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in found.named_parameters())


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, under the names that PEFT gives."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(32, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        base.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_are_not_saved_as_what_nobody_reads(tmp_path: Path) -> None:
    dense = model()
    for layer in dense.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)

    def work() -> None:
        sharded = shardcomp.shard(dense, shardcomp.Policy.load("auto", precision="fp32"))
        with pytest.raises(
            shardcomp.CheckpointError, match=r"q_proj.weight.* would be random; .*base_layer.* would not be used"
        ):
            sharded.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        sharded.save_pretrained(tmp_path / "saved", strict=False)
        again = shardcomp.shard(dense, shardcomp.Policy.load("auto", precision="fp32"), checkpoint=tmp_path / "saved")
        for (name, p), (other, q) in zip(sharded.named_parameters(), again.named_parameters(), strict=True):
            assert name == other and torch.equal(full_tensor(p.detach()), full_tensor(q.detach()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone(work)


def test_a_model_in_evaluation_mode_is_sharded_in_it() -> None:
    def work() -> None:
        sharded = shardcomp.shard(model().eval(), shardcomp.Policy.load("llama", precision="fp32"))
        assert not sharded.training
        sharded(input_ids=make_batch()["input_ids"])

    alone(work)


def test_ranks_with_other_plans_are_refused_before_they_wait_for_each_other() -> None:
    plans = [lowered("data 2, zero 0", model(), zero=zero) for zero in (1, 3)]

    def work(rank: int) -> None:
        with pytest.raises(shardcomp.PlanError, match="ranks 0 and 1 have another policy"):
            allocate(plans[rank], weights_of(plans[rank]))

    run_ranks(2, work)
