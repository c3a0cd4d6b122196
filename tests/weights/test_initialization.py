"""Fresh weights: the model's own distribution, the same numbers for everyone who asks."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

import shardcomp
from shardcomp import presets
from shardcomp.errors import ShardError
from shardcomp.weights.initialization import initialize_parameter
from support.models import tiny

DRAWN = "model.layers.1.mlp.up_proj.weight"


def _value(name: str, model: nn.Module | None = None, seed: int = 3) -> torch.Tensor:
    return initialize_parameter(name, model or presets.build(tiny()), seed, torch.float32)


def test_a_value_depends_on_seed_and_name_and_on_nothing_else() -> None:
    model = presets.build(tiny())
    value = _value(DRAWN, model)
    torch.randn(7)
    assert torch.equal(value, _value(DRAWN, presets.build(tiny(num_hidden_layers=4, vocab_size=50))))
    assert torch.equal(value, _value(DRAWN, AutoModelForCausalLM.from_config(tiny())))
    assert not torch.equal(value, _value(DRAWN, model, seed=4))
    assert not torch.equal(value, _value(DRAWN.replace("up", "gate"), model))
    assert value.dtype == torch.float32 and value.shape == (48, 32)


def test_a_value_is_drawn_in_float32_and_then_cast() -> None:
    low = initialize_parameter(DRAWN, presets.build(tiny(), torch.bfloat16), 3, torch.bfloat16)
    assert torch.equal(low, _value(DRAWN).bfloat16())
    wide = initialize_parameter(DRAWN, presets.build(tiny()), 3, torch.float64)
    assert torch.equal(wide, _value(DRAWN).double())


def test_values_follow_the_rule_of_the_model() -> None:
    model = presets.build(tiny(hidden_size=128, intermediate_size=256, initializer_range=0.05, attention_bias=True))
    assert math.isclose(_value(DRAWN, model).std(), 0.05, rel_tol=0.02)
    assert math.isclose(_value("model.embed_tokens.weight", model).std(), 0.05, rel_tol=0.02)
    assert torch.equal(_value("model.layers.0.input_layernorm.weight", model), torch.ones(128))
    assert torch.equal(_value("model.layers.0.self_attn.q_proj.bias", model), torch.zeros(128))


def test_the_rule_of_an_ancestor_counts_and_is_applied_last() -> None:
    config = GPT2Config(vocab_size=97, n_embd=128, n_layer=8, n_head=4)
    model = presets.build(config)
    assert math.isclose(_value("transformer.h.3.mlp.c_fc.weight", model).std(), 0.02, rel_tol=0.02)
    for name in ("transformer.h.3.mlp.c_proj.weight", "transformer.h.3.attn.c_proj.weight"):
        assert math.isclose(_value(name, model).std(), 0.02 / math.sqrt(2 * 8), rel_tol=0.02)


def test_the_padding_row_of_an_embedding_is_zero_as_the_rule_says() -> None:
    table = _value("model.embed_tokens.weight", presets.build(tiny(pad_token_id=5)))
    assert not table[5].any() and table[4].all()


def test_a_tied_weight_goes_by_its_first_name() -> None:
    model = presets.build(tiny(tie_word_embeddings=True))
    assert torch.equal(_value("lm_head.weight", model), _value("model.embed_tokens.weight", model))


def test_neither_the_model_nor_a_random_state_is_changed() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    before = {name: (held, held.clone()) for name, held in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    state = torch.get_rng_state()
    for name, _ in model.named_parameters():
        _value(name, model)
    assert torch.equal(state, torch.get_rng_state())
    assert dict(model.named_modules()) == modules
    for name, held in model.state_dict(keep_vars=True).items():
        assert held is before[name][0] and torch.equal(held, before[name][1]), name


def test_flags_that_say_initialised_do_not_keep_a_rule_from_running() -> None:
    model = presets.build(tiny())
    value = _value(DRAWN, model)
    for module in model.modules():
        module._is_hf_initialized = True
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    assert torch.equal(value, _value(DRAWN, model))


def test_threads_that_ask_at_once_get_the_same_numbers() -> None:
    model = presets.build(tiny())
    names = [name for name, _ in model.named_parameters()]
    expected = {name: _value(name, model) for name in names}
    found: list[dict[str, torch.Tensor]] = []

    def work(shift: int) -> None:
        found.append({name: _value(name, model) for name in names[shift:] + names[:shift]})

    threads = [threading.Thread(target=work, args=(shift * 3,)) for shift in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(each[name], expected[name]) for each in found for name in names)


def test_the_default_device_of_the_caller_does_not_count() -> None:
    model = presets.build(tiny())
    with torch.device("meta"):
        assert torch.equal(_value(DRAWN, model), _value(DRAWN, model))
        assert not _value(DRAWN, model).is_meta


def _same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_initialize_gives_real_and_meta_models_the_numbers_of_each_parameter(tied: bool) -> None:
    config = tiny(tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(config)
    held = dict(real.named_parameters())
    assert shardcomp.initialize(real, 3) is real
    assert all(held[name] is parameter for name, parameter in real.named_parameters())
    assert all(torch.equal(parameter, _value(name, real)) for name, parameter in real.named_parameters())

    built = shardcomp.initialize(presets.build(config), 3)
    with torch.device("meta"):
        everything_on_meta = AutoModelForCausalLM.from_config(config)
    everything_on_meta = shardcomp.initialize(everything_on_meta, 3)
    tokens = torch.arange(24).view(2, 12)
    logits = real(input_ids=tokens).logits
    for model in (built, everything_on_meta):
        _same(real, model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert not any(buffer.is_meta for buffer in model.buffers())
        assert torch.equal(model(input_ids=tokens).logits, logits)
        model(input_ids=tokens, labels=tokens).loss.backward()


def test_initialize_keeps_dtypes_and_what_needs_no_gradient() -> None:
    model = presets.build(tiny(), torch.bfloat16)
    model.model.norm.weight.requires_grad_(False)
    shardcomp.initialize(model, 3)
    assert model.dtype == torch.bfloat16 and not model.model.norm.weight.requires_grad
    assert torch.equal(model.get_parameter(DRAWN), _value(DRAWN).bfloat16())


class _Plain(nn.Module):
    """Not of transformers: a module with a rule of its own, and a parameter without."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 300)
        self.scale = nn.Parameter(torch.ones(3))


def test_a_module_without_init_weights_is_reset_by_its_own_rule() -> None:
    value = _value("inner.weight", _Plain())
    assert value.abs().max() <= 0.25 and math.isclose(value.std(), 0.25 / math.sqrt(3), rel_tol=0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [("scale", "scale: neither _Plain"), ("inner.wait", "no parameter inner.wait"), ("a.b", "no parameter a.b")],
)
def test_a_parameter_without_a_rule_is_refused(name: str, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        _value(name, _Plain())


def test_a_rule_that_fails_is_refused_with_its_reason() -> None:
    class Failing(_Plain):
        def _init_weights(self, module: Any) -> None:
            raise RuntimeError("no luck")

    with pytest.raises(ShardError, match="no luck"):
        _value("inner.weight", Failing())


class _Scaled(LlamaForCausalLM):
    """A model with a parameter that only its constructor sets."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, 5))


def test_what_no_rule_sets_stays_as_the_constructor_leaves_it() -> None:
    with torch.device("meta"):
        model = _Scaled(tiny())
    assert torch.equal(_value("gain", model), torch.linspace(0.5, 2.0, 5))
    assert torch.equal(_value(DRAWN, model), _value(DRAWN))
