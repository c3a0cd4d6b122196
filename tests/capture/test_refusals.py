"""What a graph cannot show, and is refused: hooks on the backward of modules, sparse gradients, frequencies of a part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from capture.plans import assert_as_dense, batch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import shardcomp
from shardcomp import presets
from shardcomp.capture import capture
from shardcomp.errors import CaptureError, PlanError
from shardcomp.ir.program import Signature
from shardcomp.weights.initialization import initialize
from support.models import tiny

pytestmark = pytest.mark.captures_anew

TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss",))


def llama(**changes: Any) -> LlamaForCausalLM:
    return initialize(presets.build(tiny(**changes)), 0)  # type: ignore[return-value]


def test_hooks_on_the_backward_of_modules_are_refused_all_at_once() -> None:
    model = llama()
    model.model.layers[1].mlp.register_full_backward_hook(lambda module, before, after: None)
    model.model.norm.register_full_backward_pre_hook(lambda module, gradient: None)
    model.register_full_backward_hook(lambda module, before, after: None)
    with pytest.raises(CaptureError) as refused:
        capture(model, TRAINING, precision="fp32")
    message = str(refused.value)
    assert "LlamaForCausalLM: 3 violations" in message
    assert "model.layers.1.mlp has a full backward hook; a sharded model would not call it" in message
    assert "model.norm has a full backward pre-hook" in message and "LlamaForCausalLM has a full backward hook" in message
    assert "use a hook on a parameter" in message
    with pytest.raises(CaptureError, match="3 violations"):
        shardcomp.lower(model, "auto")


def test_a_hook_on_the_backward_of_all_modules_is_refused() -> None:
    hook = register_module_full_backward_hook(lambda module, before, after: None)
    try:
        with pytest.raises(CaptureError, match="a full backward hook is registered for all modules"):
            capture(llama(), TRAINING, precision="fp32")
    finally:
        hook.remove()
    capture(llama(), TRAINING, precision="fp32")


class Bags(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 8, sparse=sparse, mode="sum")
        self.table = nn.Embedding(11, 8, sparse=sparse)
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = self.head(self.table(input_ids) + self.bag(input_ids).unsqueeze(1))
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.view(-1, 11), labels.view(-1)), logits=logits)


def test_sparse_gradients_are_refused_all_at_once() -> None:
    with pytest.raises(CaptureError) as refused:
        capture(Bags(sparse=True), TRAINING, precision="fp32")
    for name in ("table", "bag"):
        assert f"{name} has an embedding with sparse = True" in str(refused.value)
    assert "set sparse = False" in str(refused.value)
    capture(Bags(sparse=False), TRAINING, precision="fp32")


def test_a_sparse_embedding_that_is_frozen_has_no_gradient() -> None:
    model = Bags(sparse=True)
    model.bag.weight.requires_grad_(False)
    model.table.weight.requires_grad_(False)
    capture(model, TRAINING, precision="fp32")


def counting(tied: bool = False) -> LlamaForCausalLM:
    model = llama(tie_word_embeddings=tied)
    model.model.embed_tokens.scale_grad_by_freq = True
    return model


def policy(**options: Any) -> shardcomp.Policy:
    """The policy of llama with its embedding replicated."""
    loaded = shardcomp.Policy.load("llama", precision="fp64", **options)
    return replace(loaded, weights=tuple(entry for entry in loaded.weights if entry.pattern.text != "model.embed_tokens"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}], ids=str)
def test_gradients_divided_by_frequency_are_right_where_one_rank_has_all_samples(options: dict[str, Any], tied: bool) -> None:
    if tied and options.get("tensor"):
        pytest.skip("the head of a tied weight is split")
    assert_as_dense(lambda: counting(tied), policy(**options), [batch(16, seed) for seed in range(2)])


def test_gradients_divided_by_the_frequency_in_a_part_are_refused_all_at_once() -> None:
    with pytest.raises(PlanError) as refused:
        shardcomp.lower(counting(), shardcomp.Policy.load("llama", tensor=2, micro_batch=1), 4)
    message = str(refused.value)
    assert "3 violations" in message and "model.embed_tokens.weight: scale_grad_by_freq = True" in message
    for part in ("its rows are split over tensor = 2", "each of data = 2 ranks", "leave micro_batch = 1 out"):
        assert part in message
    with pytest.raises(PlanError, match="each of data = 2 ranks counts its own samples: use data = 1"):
        shardcomp.lower(counting(), shardcomp.Policy.load("auto"), 2)


def test_a_frozen_table_counts_nothing() -> None:
    model = counting()
    model.model.embed_tokens.weight.requires_grad_(False)
    shardcomp.lower(model, shardcomp.Policy.load("llama", tensor=2), 4)
