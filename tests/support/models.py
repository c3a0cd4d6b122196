"""Small configurations that tests share."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlamaConfig

import shardcomp
from shardcomp import presets


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


def with_idle(layers: int = 4) -> Any:
    """A model with modules that its forward does not call."""
    model = presets.build(tiny(num_hidden_layers=layers))
    model.spare = nn.Linear(5, 3)
    for layer in model.model.layers[1::2]:
        layer.spare = nn.Linear(5, 3)
    return shardcomp.initialize(model, 0)
