"""Presets: their sizes, models without memory, and small models of the same structure."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config

from shardcomp import presets
from shardcomp.errors import ShardError
from support.models import tiny

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "tiny": 804_992,
}
"""As published; `tiny` is our own."""


def test_every_preset_has_the_published_number_of_parameters_and_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {}
    for name in presets.names():
        model = presets.build(presets.config_of(name))
        assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    assert found == PARAMETERS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB


@pytest.mark.parametrize(
    ("name", "positions", "eps", "theta"),
    [
        ("llama-7b", 2048, 1e-6, 1e4),
        ("llama-65b", 2048, 1e-5, 1e4),
        ("llama-2-70b", 4096, 1e-5, 1e4),
        ("llama-3-8b", 8192, 1e-5, 5e5),
    ],
)
def test_presets_have_the_published_constants(name: str, positions: int, eps: float, theta: float) -> None:
    config = presets.config_of(name)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (positions, eps)
    frequencies = presets.buffers_of(presets.build(config))["model.rotary_emb.inv_freq"]
    expected = theta ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(frequencies, expected)


def test_a_preset_is_listed_with_its_family_by_size() -> None:
    names = presets.names()
    assert names.index("llama-7b") < names.index("llama-13b") < names.index("llama-65b")


def test_a_configuration_comes_from_a_directory_or_its_file_or_is_one(tmp_path: Any) -> None:
    tiny().save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert presets.config_of(given).vocab_size == 97
    config = tiny()
    assert presets.config_of(config) is config


def test_what_is_no_model_is_refused_with_what_would_be_one(tmp_path: Any) -> None:
    with pytest.raises(ShardError, match=r"nobody/nothing is not a preset.*llama-7b"):
        presets.config_of("nobody/nothing")
    with pytest.raises(ShardError, match="no config.json"):
        presets.config_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShardError, match="not a JSON file"):
        presets.config_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ShardError, match="model_type"):
        presets.config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(ShardError, match="no-such-family"):
        presets.config_of(tmp_path)
    with pytest.raises(ShardError, match="is not a model"):
        presets.config_of(3)


def test_a_configuration_that_brings_its_own_code_is_refused_and_the_code_not_run(tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ShardError):
        presets.config_of(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_built_model_is_the_ordinary_one_in_all_but_its_weights(dtype: torch.dtype) -> None:
    config = tiny(tie_word_embeddings=True)
    state = torch.get_rng_state()
    built = presets.build(config, dtype)
    assert torch.equal(state, torch.get_rng_state())
    key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    ordinary = AutoModelForCausalLM.from_config(config, **{key: dtype})
    assert [(n, p.shape, p.dtype) for n, p in built.named_parameters(remove_duplicate=False)] == [
        (n, p.shape, p.dtype) for n, p in ordinary.named_parameters(remove_duplicate=False)
    ]
    assert built.lm_head.weight is built.model.embed_tokens.weight
    own, theirs = dict(built.named_buffers()), dict(ordinary.named_buffers())
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert config.architectures is None


def test_building_ignores_the_default_device_and_leaves_later_modules_alone() -> None:
    with torch.device("meta"):
        model = presets.build(tiny())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not nn.Linear(2, 2).weight.is_meta


def test_buffers_on_meta_are_computed_again_from_the_configuration() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny())
    assert any(buffer.is_meta for buffer in model.buffers())
    found, expected = presets.buffers_of(model), presets.buffers_of(presets.build(tiny()))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_buffer_on_meta_that_nothing_determines_is_refused() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    with pytest.raises(ShardError, match="running_mean is on meta"):
        presets.buffers_of(model)


FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "gptj",
    "bloom",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_of_any_family_is_small_and_runs(family: str) -> None:
    full = CONFIG_MAPPING[family]()
    small = presets.shrink(full, tensor=2)
    model = AutoModelForCausalLM.from_config(small)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert type(small) is type(full)
    assert small.vocab_size % 2 == 1 and small.num_attention_heads % 2 == 0
    assert small.tie_word_embeddings == full.tie_word_embeddings
    assert model(input_ids=torch.arange(24).view(1, 24)).logits.isfinite().all()


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama-7b", "llama-2-70b", "llama-3-8b", "tiny"])
def test_shrinking_keeps_what_divides_and_the_kind_of_attention(name: str, tensor: int) -> None:
    full = presets.config_of(name)
    small = presets.shrink(full, tensor=tensor)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert (getattr(small, key) % tensor == 0) == (getattr(full, key) % tensor == 0), key
    grouped = full.num_key_value_heads < full.num_attention_heads
    assert (small.num_key_value_heads < small.num_attention_heads) == grouped
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    assert -(-small.vocab_size // tensor) * (tensor - 1) < small.vocab_size, "a rank would hold no row of the embedding"
    assert small.num_hidden_layers == 2 and small.rms_norm_eps == full.rms_norm_eps


def test_shrinking_keeps_the_ratio_of_heads_and_of_widths() -> None:
    small = presets.shrink(presets.config_of("llama-3-8b"))
    assert small.num_attention_heads == 4 * small.num_key_value_heads
    assert small.intermediate_size == 3.5 * small.hidden_size


def test_what_is_kept_is_kept_and_the_rest_follows() -> None:
    full = presets.config_of("llama-2-70b")
    small = presets.shrink(full, {"num_attention_heads": 6, "num_hidden_layers": 3, "vocab_size": 50}, tensor=2)
    assert (small.num_attention_heads, small.num_hidden_layers, small.vocab_size) == (6, 3, 50)
    assert small.num_key_value_heads == 2 and small.hidden_size == 6 * small.head_dim
    small = presets.shrink(full, {"hidden_size": 96, "num_key_value_heads": 3})
    assert (small.hidden_size, small.num_key_value_heads) == (96, 3)
    assert presets.shrink(GPT2Config(), {"num_hidden_layers": 3}).n_layer == 3


def test_shrinking_keeps_one_layer_of_each_kind_and_a_window_that_is_felt() -> None:
    small = presets.shrink(CONFIG_MAPPING["gemma3_text"]())
    assert (
        set(small.layer_types) == {"sliding_attention", "full_attention"} and len(small.layer_types) == small.num_hidden_layers
    )
    assert small.sliding_window == 8


def test_shrinking_keeps_the_kind_of_rotary_embedding() -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    full = CONFIG_MAPPING["llama"](rope_scaling=scaled, rope_theta=5e5, max_position_embeddings=131072)
    small = presets.shrink(full)
    assert small.max_position_embeddings == 131072 and small.rope_scaling["rope_type"] == "llama3"
    long = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    full = CONFIG_MAPPING["phi3"](rope_scaling=long, rope_theta=1e4, max_position_embeddings=131072)
    small = presets.shrink(full)
    assert len(small.rope_scaling["long_factor"]) == 8
    AutoModelForCausalLM.from_config(small)(input_ids=torch.arange(24).view(1, 24))


def test_shrinking_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ShardError, match="no n_layerz.*num_hidden_layers"):
        presets.shrink(tiny(), {"n_layerz": 1})
    with pytest.raises(ShardError, match="num_attention_heads.*--shrink none"):
        presets.shrink(CONFIG_MAPPING["mamba"]())
