"""Operators that write to an argument `out=`: which one that is, by their schema, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture.plans import assert_as_dense, batch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import shardcomp
from shardcomp.capture import capture, self_check
from shardcomp.capture.functionalize import pure_form, written
from shardcomp.errors import CaptureError
from shardcomp.ir.program import Signature
from support.models import tiny

pytestmark = pytest.mark.captures_anew

aten = torch.ops.aten
LOGITS = Signature((("input_ids", 2),), ("logits",))
TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss",))


class Written(nn.Module):
    """A model without attention whose hidden states are scaled by something that is computed with `out=`."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.change = change

    def forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        with torch.no_grad():
            scale = self.change(x * 2)
        return CausalLMOutputWithPast(logits=x * scale)


def into_new_memory(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    torch.div(x, 3, out=made)
    return x + made


def into_an_operand(x: Tensor) -> Tensor:
    torch.div(x, x.abs() + 1, out=x)
    return x


def into_the_second_operand(x: Tensor) -> Tensor:
    y = x.abs() + 1
    torch.div(x, y, out=y)
    return x + y


def into_a_view(x: Tensor) -> Tensor:
    torch.mul(x[..., :4], 2, out=x[..., 4:])
    return x


def into_nothing_yet(x: Tensor) -> Tensor:
    made = torch.empty(0, dtype=x.dtype)
    result = torch.exp(x, out=made)
    return result + made


def into_another_dtype(x: Tensor) -> Tensor:
    made = torch.empty(x.shape, dtype=torch.int64)
    torch.add(torch.ones_like(made), (x > 0).to(torch.uint8), out=made)
    return x * made


def several(x: Tensor) -> Tensor:
    values, where = torch.empty_like(x[..., 0]), torch.empty(x.shape[:-1], dtype=torch.int64)
    result = torch.max(x, -1, out=(values, where))
    return x + values.unsqueeze(-1) + where.unsqueeze(-1) + result.values.unsqueeze(-1)


def read_before_and_after(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    before = made + 1
    view = made[:, :1]
    torch.sin(x, out=made)
    return before + made + view


def normalized(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1, out=x)


WRITES = [into_new_memory, into_an_operand, into_the_second_operand, into_a_view, into_nothing_yet, into_another_dtype]
WRITES += [several, read_before_and_after, normalized]


@pytest.mark.parametrize("change", WRITES, ids=lambda change: change.__name__)
def test_a_write_to_a_tensor_of_the_call_becomes_a_value(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Written(change)
    program = capture(model, LOGITS, precision="fp64")
    assert self_check(program, model) == 0
    assert program.static_shape is None or change is several  # torch settles the sizes of several results
    assert not any(node.target._schema.is_mutable for node in program.units[0].body.calls() if hasattr(node.target, "_schema"))


def test_the_written_argument_and_the_pure_form_come_from_the_schema() -> None:
    known = {
        aten.div.out: (("out",), aten.div.Tensor),
        aten.div.out_mode: (("out",), aten.div.Tensor_mode),
        aten.max.dim_max: (("max", "max_values"), aten.max.dim),
        aten.mul.Scalar_out: (("out",), aten.mul.Scalar),
        aten.add_.Tensor: (("self",), None),
        aten.add.Tensor: ((), None),
        aten.native_batch_norm.out: (("out", "save_mean", "save_invstd"), aten.native_batch_norm.default),
    }
    for target, (names, pure) in known.items():
        assert written(target) == names
        if pure is not None:
            assert pure_form(target) is pure


def spectral(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(**changes))
    for layer in model.model.layers:
        nn.utils.parametrizations.spectral_norm(layer.mlp.up_proj)
    return model


def test_spectral_norm_in_training_is_refused_with_its_buffer_and_what_would_do() -> None:
    model = spectral().train()
    before = {name: held.clone() for name, held in model.named_buffers()}
    with pytest.raises(CaptureError) as refused:
        capture(model, TRAINING, precision="fp64")
    message = str(refused.value)
    assert "aten.div.out changes the buffer _u of model.layers.0.mlp.up_proj.parametrizations.weight.0 in place" in message
    assert "remove the parametrization of model.layers.0.mlp.up_proj before sharding" in message
    assert all(torch.equal(held, before[name]) for name, held in model.named_buffers())


def test_spectral_norm_in_evaluation_is_its_last_estimate() -> None:
    model = spectral().eval()
    before = {name: held.clone() for name, held in model.named_buffers()}
    program = capture(model, Signature((("input_ids", 2), ("labels", 2)), ("loss",), training=None), precision="fp64")
    assert self_check(program, model) <= 1e-12
    assert all(torch.equal(held, before[name]) for name, held in model.named_buffers())


class Keeps(nn.Module):
    """Writes the mean of what it sees to a buffer, by `out=` or in place, and computes with it."""

    def __init__(self, by_out: bool) -> None:
        super().__init__()
        self.by_out = by_out
        self.register_buffer("mean", torch.zeros(8))
        self.embed = nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        with torch.no_grad():
            if self.by_out:
                torch.mean(x, (0, 1), out=self.mean)
            else:
                self.mean.mul_(0.5)
        return CausalLMOutputWithPast(logits=x - self.mean)


@pytest.mark.parametrize(("by_out", "operator"), [(True, "aten.mean.out"), (False, "aten.mul_.Tensor")])
def test_a_buffer_that_a_forward_changes_is_named(by_out: bool, operator: str) -> None:
    message = rf"test_writes_out.py:\d+: {operator} changes the buffer mean of the model in place, .*: compute it without"
    with pytest.raises(CaptureError, match=message):
        capture(Keeps(by_out), LOGITS, precision="fp32")


class Scales(nn.Module):
    """A parametrization that computes with `out=` and keeps nothing."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            norm = torch.empty(weight.shape[0], 1, dtype=weight.dtype)
            torch.amax(weight.abs(), dim=1, keepdim=True, out=norm)
            torch.add(norm, 1.0, out=norm)
        return weight / norm


def scaled() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny())
    for layer in model.model.layers:
        nn.utils.parametrize.register_parametrization(layer.mlp.down_proj, "weight", Scales())
    return model


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_parametrization_that_writes_to_new_memory_trains(tensor: int) -> None:
    assert_as_dense(scaled, shardcomp.Policy.load("auto", precision="fp64", tensor=tensor), [batch()])
