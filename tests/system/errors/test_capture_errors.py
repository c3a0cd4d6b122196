"""What a capture and the canonical form refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from shardcomp import Policy
from shardcomp.capture import capture
from shardcomp.errors import CaptureError, PlanError, PolicyError
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import Context, Signature
from shardcomp.passes import canonicalize
from support.models import tiny

pytestmark = pytest.mark.captures_anew

TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss",))


class Small(nn.Module):
    """A model without attention, to be spoiled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)
        self.factor = 1.0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.middle(self.embed(input_ids)))
        return CausalLMOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.view(-1, 11), labels.view(-1))


def lower(model: nn.Module) -> None:
    canonicalize.run(capture(model, TRAINING, precision="fp32"), Context(Mesh(), Policy.load("llama")))


def test_the_model_that_is_spoiled_below_is_good() -> None:
    lower(Small())


class BranchesOnData(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class WritesThroughAnExpansion(Small):
    def middle(self, x: Tensor) -> Tensor:
        y = x[:, :1] * 2
        y.expand_as(x)[:, 0] = 0
        return y + x


class WritesToAParameter(Small):
    def middle(self, x: Tensor) -> Tensor:
        self.head.bias.detach().view(-1).zero_()
        return x


class ReadsAWrittenReshape(Small):
    def middle(self, x: Tensor) -> Tensor:
        y = x * 2
        flat = y.reshape(-1, 8)
        y[:, 0] = 0
        return flat.view_as(x)


class DependentSize(Small):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.nonzero(x[0, :, 0]).sum()


class Autocast(Small):
    def middle(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.mT @ x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BranchesOnData, r"BranchesOnData cannot be exported: .*test_capture_errors.py:\d+: return x if x.sum\(\) > 0 else -x"),
        (WritesThroughAnExpansion, r"test_capture_errors.py:\d+: .*changes a tensor in place that other tensors may share"),
        (WritesToAParameter, r"test_capture_errors.py:\d+: .*changes a tensor in place that other tensors may share"),
        (ReadsAWrittenReshape, r"test_capture_errors.py:\d+: .*in place that other tensors may share, or reads such a one"),
        (DependentSize, r"test_capture_errors.py:\d+: a size depends on the data"),
        (Autocast, r"test_capture_errors.py:\d+: the model turns autocast on"),
    ],
)
def test_what_has_no_flat_graph_names_the_line(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        lower(kind())


def test_a_module_deep_in_the_model_is_named() -> None:
    model = LlamaForCausalLM(tiny())
    model.model.layers[1].mlp.act_fn = Sign()
    with pytest.raises(
        CaptureError, match=r"model\.layers\.1\.mlp\.act_fn \(Sign\), test_capture_errors.py:\d+: if x\.max\(\) > 0"
    ):
        capture(model, TRAINING, precision="bf16")


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 0:
            return x
        return -x


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (Signature((("input_ids", 2),), ("loss",)), r"Small\(input_ids\) returns no loss: it returns logits"),
        (Signature((("input_ids", 2), ("labels", 2)), ("hidden",)), "returns no hidden: it returns loss, logits"),
        (Signature((("inputs_embeds", 3),), ("logits",)), r"inputs_embeds has 3 dimensions; a capture takes \[b, s\] inputs"),
    ],
    ids=["loss", "hidden", "embeddings"],
)
def test_a_call_that_does_not_fit_says_what_the_model_gives(signature: Signature, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Small(), signature, precision="fp32")


def test_an_input_that_the_model_does_not_take_is_named() -> None:
    with pytest.raises(CaptureError, match="position_ids"):
        capture(Small(), Signature((("input_ids", 2), ("position_ids", 2)), ("logits",)), precision="fp32")


class Tuple(Small):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return super().forward(input_ids, labels).to_tuple()


def test_a_model_that_returns_no_names_is_refused() -> None:
    with pytest.raises(CaptureError, match="returns no loss and no logits: it returns tuple"):
        lower(Tuple())


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = Small()
    model.held = (number for number in range(3))
    with pytest.raises(CaptureError, match="Small cannot be copied, which a capture needs"):
        lower(model)


def test_a_precision_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(PolicyError, match="'fp8': use one of bf16, fp32, fp16, fp64"):
        capture(Small(), TRAINING, precision="fp8")


class Secretive(LlamaForCausalLM):
    """Computes something else under capture than in a run."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, use_cache=False)
        if not torch.compiler.is_exporting():
            out.logits = out.logits * 1.5
        return out


def test_a_graph_that_is_not_the_model_does_not_pass_for_it() -> None:
    with pytest.raises(CaptureError, match=r"the captured graph is off from the model by .*the model does something"):
        capture(Secretive(tiny()), Signature((("input_ids", 2),), ("logits",)), precision="bf16")


class TwoLosses(Small):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + super().loss(logits * 2, labels)


class WeightedLoss(Small):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * super().loss(logits, labels)


class SquaredLoss(Small):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sum(-1) - labels).pow(2).mean()


class SummedLoss(Small):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.view(-1, 11), labels.view(-1), reduction="sum", label_smoothing=0.1)


class UnflatLoss(Small):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.mT, labels)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TwoLosses, "2 cross entropies feed the loss; exactly one"),
        (SquaredLoss, "0 cross entropies feed the loss"),
        (
            WeightedLoss,
            r"test_capture_errors.py:\d+: the loss is not the mean of a cross entropy but is made of one by aten.mul",
        ),
        (SummedLoss, r"only the plain mean .* here reduction = 2, label_smoothing = 0.1"),
        (UnflatLoss, r"logits of shape \(b, 11, s\)"),
    ],
)
def test_a_loss_that_cannot_be_divided_by_a_count_is_refused(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        lower(kind())


class NoisyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.alpha_dropout(super().forward(x) + torch.rand_like(x[..., :1]), 0.1, True)


def test_random_numbers_of_anything_but_dropout_are_refused_with_operator_and_module() -> None:
    model = LlamaForCausalLM(tiny(attention_dropout=0.1))
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = NoisyLinear
    with pytest.raises(PlanError) as refused:
        lower(model)
    for operator in ("aten.rand_like", "aten.alpha_dropout"):
        assert f"{operator}, called in model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, draws" in str(refused.value)
    assert "aten.dropout" not in str(refused.value) and "self_attn" not in str(refused.value)


def test_dropout_of_a_model_that_is_not_training_is_nothing() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    given = Signature((("input_ids", 2),), ("logits",), training=False)
    program = canonicalize.run(capture(GPT2LMHeadModel(config), given, precision="fp32"), Context(Mesh(), Policy.load("llama")))
    assert not any("dropout" in str(node.target) or "dropout" in node.kwargs for node in program.units[0].body.calls())
