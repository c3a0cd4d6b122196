"""A capture in the mode that the caller's model has each of its modules in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from shardcomp.capture import Exports, capture, self_check
from shardcomp.capture.check import draws
from shardcomp.ir.program import Program, Signature
from shardcomp.runtime.origin import mode_of
from support.models import tiny

pytestmark = pytest.mark.captures_anew

INPUTS = (("input_ids", 2), ("labels", 2))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def dropping(program: Program) -> set[str]:
    """The modules in which something is drawn at random."""
    return {node.meta["path"] for body in program.bodies() for node in body.calls() if draws(node)}


def test_the_mode_of_a_model_is_none_where_its_modules_differ() -> None:
    model = gpt2()
    assert mode_of(model.train()) is True and mode_of(model.eval()) is False
    model.transformer.h[0].train()
    assert mode_of(model) is None
    assert mode_of(nn.Linear(1, 1).eval()) is False


def test_each_module_keeps_its_own_mode() -> None:
    model = gpt2().train()
    everything = dropping(capture(model, Signature(INPUTS, ("loss",)), precision="fp32"))
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    mixed = dropping(capture(model, Signature(INPUTS, ("loss",), training=None), precision="fp32"))
    assert mixed == {path for path in everything if not path.startswith("transformer.h.0")} != everything
    assert before == [module.training for module in model.modules()]
    assert dropping(capture(model, Signature(INPUTS, ("loss",), training=False), precision="fp32")) == set()


class Doubled(nn.Dropout):
    """Something that depends on the mode and draws nothing, so that the self-check can compare it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * 2 if self.training else input


def test_the_self_check_compares_in_the_models_own_modes() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny()).train()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, Doubled(0.0))
    model.model.layers[1].eval()
    program = capture(model, Signature(INPUTS, ("logits",), training=None), precision="fp64")
    assert self_check(program, model) < 1e-12
    model.train()
    assert self_check(program, model) > 1e-3


def test_an_export_is_not_taken_for_one_of_other_modes() -> None:
    model, exports = gpt2().eval(), Exports()
    call = Signature(INPUTS, ("loss",), training=None)
    model.transformer.h[0].train()
    first = dropping(capture(model, call, precision="fp32", exports=exports))
    model.eval().transformer.h[1].train()
    second = dropping(capture(model, call, precision="fp32", exports=exports))
    assert {path.split(".")[2] for path in first} == {"0"} and {path.split(".")[2] for path in second} == {"1"}
    assert len(exports) == 2
