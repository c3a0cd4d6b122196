"""Small configurations that tests share."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


def tiny(**changes: Any) -> LlamaConfig:
    """A two-layer LLaMA with grouped queries and an odd vocabulary."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})
