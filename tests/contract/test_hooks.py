"""Hooks of parameters are called once per backward, with the reduced gradient; those of modules are captured or refused."""

from __future__ import annotations

import pytest
import torch
from contract.plans import (
    FLAT,
    LOGITS,
    LOSS,
    PLANS,
    assert_gradients,
    double,
    exactly,
    gradients,
    lowered,
    make_batch,
    mine,
    model,
    run,
    usual,
)
from torch import Tensor, nn
from transformers import GPT2Config

import shardcomp
from shardcomp import presets
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel

each_plan = pytest.mark.parametrize("plan", PLANS)
TRAINED_ROWS = 90


def new_rows_only(gradient: Tensor) -> Tensor:
    """What trains the rows that were added to an embedding, and keeps the others."""
    gradient = gradient.clone()
    gradient[:TRAINED_ROWS] = 0
    return gradient


@each_plan
def test_gradient_hooks_from_before_sharding_see_whole_gradients(plan: str) -> None:
    dense, batch, called = model(), make_batch(), []
    dense.model.embed_tokens.weight.register_hook(new_rows_only)
    removed = dense.lm_head.weight.register_hook(lambda gradient: gradient * 7)
    dense.lm_head.weight.register_hook(lambda gradient: called.append(gradient.shape))
    low = lowered(plan, dense, micro_batch=1)
    low.for_call(LOSS, (1, 8))
    removed.remove()  # after sharding was planned, and still by its own handle
    expected = gradients(model(), lambda m: m(**batch).loss)
    expected["model.embed_tokens.weight"] = new_rows_only(expected["model.embed_tokens.weight"])

    def work(sharded: ShardedModel) -> None:
        for _ in range(2):  # the hook sees each pass's own gradient
            sharded.train_step(**mine(sharded, batch))
        assert_gradients(sharded, {name: 2 * gradient for name, gradient in expected.items()})

    run(low, work)
    holders = low.mesh.world_size // low.mesh.pp
    assert called == [(97, 32)] * 2 * holders


@each_plan
def test_gradient_hooks_of_a_packed_weight_see_it_packed(plan: str) -> None:
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    dense, batch = shardcomp.initialize(presets.build(config), 0), make_batch()
    name = "transformer.h.0.attn.c_attn.weight"
    dense.get_parameter(name).register_hook(lambda gradient: gradient * torch.arange(1.0, 97.0))
    low = lowered(plan, dense, (LOSS,))
    expected = gradients(shardcomp.initialize(presets.build(config), 0), lambda m: m(**batch).loss)[name] * torch.arange(
        1.0, 97.0
    )

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**mine(sharded, batch))
        held = {n: full_tensor(p.grad) for n, p in sharded.named_parameters() if n.startswith(name)}
        if sharded.mesh.get_local_rank("pp") == 0:
            assert (
                torch.cat([held[n] for n in sorted(held, key=lambda n: "qkv".find(n[-1]))], 1).sub(expected).abs().max() < 1e-12
            )

    run(low, work)


@each_plan
def test_gradient_hooks_on_sharded_parameters_see_the_reduced_one(plan: str) -> None:
    batch = make_batch()
    expected = gradients(model(), lambda m: m(**batch).loss)
    low = lowered(plan, model(), micro_batch=1)
    low.for_call(LOSS, (1, 8))

    def work(sharded: ShardedModel) -> None:
        calls = []

        def double_it(gradient: Tensor) -> Tensor:
            calls.append(full_tensor(gradient))
            return gradient * 2

        for p in sharded.parameters():
            p.register_hook(double_it)
        sharded.train_step(**mine(sharded, batch))
        assert len(calls) == len(list(sharded.parameters()))
        assert_gradients(sharded, {name: 2 * gradient for name, gradient in expected.items()})

    run(low, work)


@each_plan
def test_post_accumulate_hooks_are_called_when_gradients_stand(plan: str) -> None:
    """An optimizer in the backward: every parameter steps by itself, and its gradient is gone."""
    batch, dense = make_batch(), model()
    low = lowered(plan, model(), micro_batch=1)
    low.for_call(LOSS, (1, 8))
    twin = double(dense)
    with exactly():
        twin(**batch).loss.backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in twin.named_parameters()}

    def step(p: nn.Parameter) -> None:
        with torch.no_grad():
            p -= 0.1 * p.grad
        p.grad = None

    def work(sharded: ShardedModel) -> None:
        for p in sharded.parameters():
            p.register_post_accumulate_grad_hook(step)
        sharded.train_step(**mine(sharded, batch))
        for name, p in sharded.named_parameters():
            assert p.grad is None
            torch.testing.assert_close(full_tensor(p.detach()), expected[name], rtol=1e-9, atol=1e-12)

    run(low, work)


@each_plan
def test_post_accumulate_hooks_from_before_get_a_whole_parameter(plan: str) -> None:
    batch, dense = make_batch(), model()

    def clamp(p: nn.Parameter) -> None:
        p.grad[:TRAINED_ROWS] = 0
        with torch.no_grad():
            p[TRAINED_ROWS:] += 1

    dense.lm_head.weight.register_post_accumulate_grad_hook(clamp)
    before = dense.lm_head.weight.detach().double()
    expected = gradients(model(), lambda m: m(**batch).loss)["lm_head.weight"]
    expected[:TRAINED_ROWS] = 0

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**mine(sharded, batch))
        held = dict(sharded.named_parameters()).get("lm_head.weight")
        if held is not None:
            torch.testing.assert_close(full_tensor(held.grad), expected, rtol=1e-9, atol=1e-12)
            grown = before.clone()
            grown[TRAINED_ROWS:] += 1
            assert torch.equal(full_tensor(held.detach()), grown)

    run(lowered(plan, dense, (LOSS,)), work)


@pytest.mark.parametrize("plan", FLAT)
def test_hooks_see_the_gradient_of_a_loss_of_ones_own(plan: str) -> None:
    batch, dense = make_batch()["input_ids"], model()
    dense.model.embed_tokens.weight.register_hook(new_rows_only)
    expected = gradients(model(), lambda m: (m(input_ids=batch).logits ** 2).sum())
    expected["model.embed_tokens.weight"] = new_rows_only(expected["model.embed_tokens.weight"])

    def work(sharded: ShardedModel) -> None:
        (sharded(input_ids=mine(sharded, {"ids": batch})["ids"]).logits.full_tensor() ** 2).sum().backward()
        assert_gradients(sharded, expected)

    run(lowered(plan, dense, (LOGITS,)), work)


@each_plan
def test_forward_hooks_from_before_sharding_are_captured(plan: str) -> None:
    batch = make_batch()

    def hooked() -> nn.Module:
        dense = model()
        dense.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
        dense.model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        return dense

    expected = gradients(hooked(), lambda m: m(**batch).loss)

    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**mine(sharded, batch))
        assert_gradients(sharded, expected)

    run(lowered(plan, hooked(), (LOSS,)), work)


@pytest.mark.parametrize("plan", FLAT)
def test_forward_hooks_of_the_model_itself_are_called_or_refused(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        batch, calls = mine(sharded, make_batch()), []
        handle = sharded.register_forward_hook(lambda module, args, out: calls.append("after"))
        sharded.register_forward_pre_hook(lambda module, args: calls.append("before"))
        sharded(**batch)
        assert calls == ["before", "after"]
        for step in (sharded.train_step, sharded.eval_step):
            with pytest.raises(shardcomp.PlanError, match=r"step with forward hooks on the sharded model"):
                step(**batch)
        handle.remove()

    run(usual(plan), work)


@each_plan
def test_a_hook_may_not_return_a_plain_tensor_for_a_sharded_gradient(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        for p in sharded.parameters():
            p.register_hook(lambda gradient: torch.zeros(gradient.shape))
        with pytest.raises(shardcomp.PlanError, match="returned a plain tensor"):
            sharded.train_step(**mine(sharded, make_batch()))

    run(usual(plan), work)
