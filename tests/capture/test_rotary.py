"""Rotary embeddings whose frequencies depend on the positions: `longrope`, `dynamic`, and several kinds of layers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture.plans import assert_as_dense, batch
from torch import nn
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import shardcomp
from shardcomp.capture import capture, self_check
from shardcomp.ir.interpreter import evaluate
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import Signature
from shardcomp.verification.dense_model import in_dtype
from support.models import tiny

pytestmark = pytest.mark.captures_anew

TRAINED = 16
"""The longest sequence that the models below keep their first frequencies for."""
LENGTHS = (8, 24, TRAINED, TRAINED + 2, 8, 40)


def longrope(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    rope = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 97, "num_key_value_heads": 2}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": TRAINED}
    return Phi3ForCausalLM(Phi3Config(**{**sizes, **ends, **lengths, "rope_scaling": rope, **changes}))


def dynamic(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0}
    return LlamaForCausalLM(tiny(max_position_embeddings=TRAINED, rope_scaling=rope, **changes))


MODELS: dict[str, Callable[[], nn.Module]] = {"longrope": longrope, "dynamic": dynamic}
PLANS: dict[str, dict[str, Any]] = {"one rank": {}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2, "micro_batch": 1}}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", MODELS)
def test_frequencies_follow_the_length_back_and_forth(kind: str, plan: str) -> None:
    policy = shardcomp.Policy.load("auto", precision="fp64", **PLANS[plan])
    assert_as_dense(MODELS[kind], policy, [batch(length, seed) for seed, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("kind", MODELS)
def test_the_positions_decide_and_not_the_number_of_tokens(kind: str) -> None:
    model = MODELS[kind]()
    program = capture(model, Signature((("input_ids", 2), ("position_ids", 2)), ("logits",)), precision="fp64")
    assert program.static_shape is None and self_check(program, model) <= 1e-14
    [note] = program.degraded
    assert note.what == "rope" and "each micro-batch" in note.why
    for first in (0, TRAINED - 8, TRAINED - 7, 3 * TRAINED):
        dense = in_dtype(MODELS[kind](), torch.float64)
        ids = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(first))
        given = {"input_ids": ids, "position_ids": torch.stack([torch.arange(8), torch.arange(8) + first])}
        with Widened(), torch.no_grad():
            expected = dense(**given, use_cache=False).logits
            got = evaluate(program, given, dict(dense.named_parameters()))["logits"]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", MODELS)
def test_earlier_calls_of_a_model_do_not_count_and_the_model_is_left_as_it_was(kind: str) -> None:
    model = MODELS[kind]()
    with torch.no_grad():
        model(**batch(40))
    before = rotary_state(model)
    policy = shardcomp.Policy.load("auto", precision="fp64")
    assert_as_dense(lambda: model, policy, [batch(8), batch(24)], dense_model=MODELS[kind])
    after = rotary_state(model)
    assert before.keys() == after.keys()
    assert all(a is after[name] or torch.equal(a, after[name]) for name, a in before.items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_pass_their_self_check(kind: str, precision: str) -> None:
    program = capture(MODELS[kind](), Signature((("input_ids", 2), ("labels", 2)), ("loss",)), precision=precision)
    assert program.static_shape is None and not program.degraded


def rotary_state(model: nn.Module) -> dict[str, Any]:
    rotary: Any = model.get_submodule("model.rotary_emb")
    return {**vars(rotary), **{f"buffer {name}": held.clone() for name, held in rotary.named_buffers()}}


def gemma3(**rope: dict[str, Any]) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 97, "max_position_embeddings": TRAINED}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **layers, **ends, rope_parameters=rope))


def several_kinds() -> nn.Module:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    full = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20, **factors}
    return gemma3(full_attention=full, sliding_attention={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})


def one_kind_of_several() -> nn.Module:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    full = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": TRAINED, **factors}
    return gemma3(full_attention=full, sliding_attention={"rope_type": "default", "rope_theta": 1e4})


@pytest.mark.parametrize("make", [several_kinds, one_kind_of_several])
def test_each_kind_of_layer_has_its_own_frequencies(make: Callable[[], nn.Module]) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    policy = shardcomp.Policy.load("auto", precision="fp64")
    assert_as_dense(make, policy, [batch(length, seed) for seed, length in enumerate((8, 18, 24, 8))])
