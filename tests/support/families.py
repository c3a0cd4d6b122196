"""A tiny configuration of every kind of model that tests compile: two layers of 32, four heads, grouped queries where the kind
has them, an odd vocabulary, no dropout. A kind is a model type of transformers, or one of a type's variants."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# fmt: off
GATE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "falcon",
    "falcon_new", "falcon_rw", "bloom", "opt", "cohere", "olmo2", "granite", "stablelm", "gpt_bigcode",
]
"""What every version must compile."""
MORE = [
    "phi", "starcoder2", "gptj", "gpt_neo", "mpt", "codegen", "glm", "glm4", "smollm3", "olmo", "cohere2", "seed_oss",
    "exaone4", "helium", "nemotron", "persimmon", "arcee", "ernie4_5", "hunyuan_v1_dense", "olmo3", "apertus",
]
# fmt: on

_TOKENS = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
_GATED = {**_PLAIN, "intermediate_size": 64, "num_key_value_heads": 2}
_GPT2 = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_FALCON = {**_PLAIN, "hidden_dropout": 0.0}
_WINDOW = {"query_pre_attn_scalar": 16, "sliding_window": 8, "head_dim": 16}

_SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen3": {**_GATED, "head_dim": 16},
    "gemma": {**_GATED, "head_dim": 16},
    "gemma2": {**_GATED, **_WINDOW},
    "gemma3_text": {**_GATED, **_WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_GATED, "pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi": {**_GATED, "pad_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "starcoder2": {**_GATED, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "granite": {
        **_GATED,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
    },
    "stablelm": {**_GATED, "pad_token_id": None, "use_qkv_bias": True, "hidden_dropout": 0.0},
    "persimmon": {**_GATED, "hidden_dropout": 0.0},
    "glm": {**_GATED, "head_dim": 16, "pad_token_id": 0},
    "glm4": {**_GATED, "head_dim": 16, "pad_token_id": 0},
    "helium": {**_GATED, "head_dim": 8},
    "smollm3": {**_GATED, "pad_token_id": 0},
    "seed_oss": {**_GATED, "residual_dropout": 0.0},
    "exaone4": {**_GATED, "pad_token_id": None},
    "hunyuan_v1_dense": {**_GATED, "head_dim": 8},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {**_PLAIN, "intermediate_size": 64, "hidden_dropout": 0.0, "rotary_pct": 0.25},
    "gpt_neo": {
        **_TOKENS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "falcon": _FALCON,
    "falcon_new": {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_rw": {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "bloom": {
        **_TOKENS,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "opt": {**_PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mpt": {**_TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
}
"""Kinds that take other keys than `_GATED`."""


def families() -> list[str]:
    """The kinds that the installed transformers knows, those of GATE first."""
    return [name for name in [*GATE, *MORE] if _model_type(name) in CONFIG_MAPPING_NAMES]


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of one kind. `changes`: keys of it, by the kind's own names."""
    return AutoConfig.for_model(_model_type(name), **{**_SPECIAL.get(name, _GATED), **changes})


def _model_type(name: str) -> str:
    return "falcon" if name.startswith("falcon") else name
