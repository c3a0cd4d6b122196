"""Models by name: configurations that come with shardcomp, models on meta from a configuration, and small ones for comparisons.

A preset is a HuggingFace `config.json` in this folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardcomp.errors import ShardError


def names() -> list[str]:
    """The presets, small ones first."""
    folder = Path(str(resources.files(__name__)))
    return sorted((path.stem for path in folder.glob("*.json")), key=lambda name: (name != "tiny", name))


def config_of(model: Any) -> Any:
    """The HuggingFace configuration of a preset, a directory or `config.json`, a hub name, or a configuration itself.

    Raises ShardError that names the presets where none of these fits.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    preset = Path(str(resources.files(__name__))) / f"{model}.json"
    path = preset if preset.is_file() else Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            settings = json.loads(path.read_text())
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (ValueError, KeyError, TypeError) as fault:
            raise ShardError(f"{path} is not the configuration of a model that this transformers knows: {fault}") from fault
    if path.suffix == ".json" or Path(model).exists():
        raise ShardError(f"{model}: no config.json there; give a preset ({', '.join(names())}), a directory, or a hub name")
    try:
        return AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise ShardError(f"{model!r} is no preset ({', '.join(names())}), no directory, and not reachable as a hub name: {reason}") from fault


class _EmptyOnMeta(TorchFunctionMode):
    """Weights are made by `torch.empty`: those go to meta. What is computed, such as rotary buffers, stays real."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run `func`, a factory of empty tensors with the meta device."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of a configuration: parameters in `dtype` on meta, buffers real on the CPU."""
    from transformers import AutoModelForCausalLM

    with _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return _parameters_to_meta(model, dtype)


def _parameters_to_meta(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model with every parameter on meta; ties stay ties."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                kind = dtype if dtype is not None and p.is_floating_point() else p.dtype
                made = moved.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=kind, device="meta"), p.requires_grad))
                module._parameters[name] = made
    return model


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The real values of a model's buffers: its own, or, where those are on meta, of the same class built anew."""
    own = dict(model.named_buffers())
    if not any(buffer.is_meta for buffer in own.values()):
        return {name: buffer.detach().cpu() for name, buffer in own.items()}
    config = getattr(model, "config", None)
    if config is None:
        missing = next(name for name, buffer in own.items() if buffer.is_meta)
        raise ShardError(f"the buffer {missing} is on meta and {type(model).__name__} has no config to compute it from: build the "
                         "model with real buffers")
    with _EmptyOnMeta():
        again = dict(type(model)(copy.deepcopy(config)).named_buffers())
    missing = [name for name in own if name not in again or again[name].is_meta]
    if missing:
        raise ShardError(f"the buffer {missing[0]} of {type(model).__name__} has no value: build the model with real buffers")
    return {name: again[name].detach() if buffer.is_meta else buffer.detach().cpu() for name, buffer in own.items()}


_SMALL = {"num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 128}


def shrink(config: Any, keep: Mapping[str, Any] | None = None, tensor: int = 1) -> Any:
    """A small configuration of the same structure: the ratio of query to key heads, ties, biases and rotary variant stay.

    `keep` sets keys to values of the caller's. `tensor`: the heads stay divisible by it where the full number is.
    """
    small = copy.deepcopy(config)
    unknown = [key for key in keep or {} if not hasattr(config, key)]
    if unknown:
        raise ShardError(f"shrink: {type(config).__name__} has no {', '.join(unknown)}")
    heads = int(config.num_attention_heads)
    groups = heads // int(getattr(config, "num_key_value_heads", None) or heads)
    kv = tensor if (heads // groups) % tensor == 0 else heads // groups
    sizes = {**_SMALL, "num_attention_heads": kv * groups}
    if getattr(config, "num_key_value_heads", None):
        sizes["num_key_value_heads"] = kv
    head = 4
    sizes["hidden_size"] = head * kv * groups
    if getattr(config, "head_dim", None):
        sizes["head_dim"] = head
    if getattr(config, "intermediate_size", None):
        sizes["intermediate_size"] = 3 * head * kv * groups
    if getattr(config, "pad_token_id", None) is not None:
        sizes["pad_token_id"] = 1
    for key, held in {**sizes, **(keep or {})}.items():
        setattr(small, key, held)
    return small
