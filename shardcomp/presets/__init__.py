"""Configurations that go by a short name, and models made from a configuration without memory for their weights.

A preset is a HuggingFace `config.json` in this directory, named for what it is called on the command line.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from shardcomp.errors import ShardError
from shardcomp.presets.shrinking import shrink

__all__ = ["buffers_of", "build", "config_of", "constructed", "names", "shrink"]

_HERE = Path(__file__).parent

SMALL = 2**16
"""Elements of the parameters whose values a constructor may say."""


def names() -> list[str]:
    """The presets, in the order in which a person would list them: small before large within a family."""
    return [path.stem for path in sorted(_HERE.glob("*.json"), key=_order)]


def _order(path: Path) -> tuple[str, int]:
    family, _, size = path.stem.rpartition("-")
    number = size.removesuffix("b")
    return (family or path.stem, int(number)) if number.isdigit() else (path.stem, 0)


def config_of(model: Any) -> Any:
    """The HuggingFace configuration that `model` stands for.

    model: a configuration (returned as it is), a preset's name, a directory or `config.json` of the caller's, or a hub name, in
    this order. Raises ShardError where there is none, or where it needs code of its own, which is never run.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, (str, Path)) or not str(model):
        raise ShardError(f"{model!r} is no model: give {_choices()}")
    source = _HERE / f"{model}.json" if str(model) in names() else _own_file(Path(model).expanduser())
    try:
        return AutoConfig.from_pretrained(str(source.absolute() if source else model), trust_remote_code=False)
    except Exception as problem:
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".")
        if source is not None:
            raise ShardError(f"{source} is no configuration that transformers can read: {reason}") from problem
        raise ShardError(
            f"{model} is no preset, no file or directory, and could not be had from the hub: {reason}; give {_choices()}"
        ) from problem


def _choices() -> str:
    return f"a preset ({', '.join(names())}), a directory or config.json, or a hub name that can be reached from here"


def _own_file(path: Path) -> Path | None:
    """The `config.json` that a path of the caller's means; None if nothing is there, so that it must be a hub name."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        if path.is_dir():
            raise ShardError(f"{path}: the directory holds no config.json")
        return None
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as problem:
        raise ShardError(f"{file}: not a JSON file: {problem}") from problem
    if not isinstance(found, dict) or "model_type" not in found:
        raise ShardError(f'{file}: no "model_type" in it, so it is not a HuggingFace configuration')
    return file


def build(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of a configuration: parameters on meta in `dtype`, so that no memory is taken for weights,
    buffers real and on the CPU. `config` is copied. Raises ShardError where transformers has no such model.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    # Releases before 4.56 know the dtype by another name.
    key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    with _parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **{key: dtype})
        except (ValueError, KeyError, ImportError) as problem:
            raise ShardError(f"no causal language model from this {type(config).__name__}: {problem}") from problem
    model.config.architectures = [type(model).__name__]
    return model


def constructed(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """What a model's constructor gives its small parameters, such as the scale of a norm: name -> value in float32, on the CPU.

    Empty for a model that cannot be built from `model.config` alone.
    """
    config = getattr(model, "config", None)
    if config is None:
        return {}
    with _parameters_on_meta(but_up_to=SMALL):
        torch.manual_seed(seed)
        try:
            again = type(model)(copy.deepcopy(config))
        except Exception:
            return {}
    return {name: held.detach().float() for name, held in again.named_parameters() if not held.is_meta}


@contextlib.contextmanager
def _parameters_on_meta(but_up_to: int = 0) -> Iterator[None]:
    """Parameters of more than `but_up_to` elements that this thread registers go to meta; one registered twice stays one.

    Each exists on the CPU for the moment in between, uninitialised, which costs address space but no memory. Everything else
    is computed on the CPU, whatever device the caller has made the default.
    """
    mine = threading.get_ident()
    replaced = WeakTensorKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != mine or parameter.is_meta or parameter.numel() <= but_up_to:
            return None
        if parameter not in replaced:
            replaced[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        return replaced[parameter]

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        hook.remove()


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The values of all buffers by name, on the CPU where the model's own are on meta: those come from building it once more.

    Raises ShardError for a buffer on meta of a model that cannot be built from `model.config` alone.
    """
    own = dict(model.named_buffers(remove_duplicate=False))
    absent = [name for name, held in own.items() if held.is_meta]
    if not absent:
        return own
    config = getattr(model, "config", None)
    advice = "build the model with its buffers on a real device"
    if config is None:
        raise ShardError(f"{type(model).__name__}: buffer {absent[0]} is on meta, and no config says what is in it: {advice}")
    with _parameters_on_meta():
        try:
            again = dict(type(model)(copy.deepcopy(config)).named_buffers(remove_duplicate=False))
        except Exception as problem:
            raise ShardError(
                f"{type(model).__name__}: buffer {absent[0]} is on meta, and the model cannot be built from its config: "
                f"{type(problem).__name__}: {problem}; {advice}"
            ) from problem
    for name in absent:
        if name not in again or again[name].shape != own[name].shape or again[name].is_meta:
            raise ShardError(f"{type(model).__name__}: buffer {name} is on meta and its config does not determine it: {advice}")
        own[name] = again[name].to(own[name].dtype)
    return own
