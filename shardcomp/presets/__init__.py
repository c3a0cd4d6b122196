"""Configurations with a short name, and models that are built from a configuration without memory for their weights.

A preset is a HuggingFace `config.json` in this directory. Its file name is its name on the command line. The functions import
torch and transformers when they need them, because the command line completes the names of presets without either.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardcomp.errors import ShardError
from shardcomp.policy.patterns import nearest
from shardcomp.presets.shrinking import shrink

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["buffers_of", "build", "config_of", "constructed", "names", "shrink"]

_HERE = Path(__file__).parent

HUB_SECONDS = 10.0
"""How long the hub may take to answer the first request."""

SMALL = 2**16
"""Parameters of up to this many elements have the values that the model's constructor gives them."""


def names() -> list[str]:
    """The names of the presets, by family, and by size within a family.

    Example:
        >>> [name for name in names() if name.startswith("llama-2")]
        ['llama-2-7b', 'llama-2-13b', 'llama-2-70b']
    """
    return [path.stem for path in sorted(_HERE.glob("*.json"), key=_order)]


def _order(path: Path) -> tuple[str, int]:
    family, _, size = path.stem.rpartition("-")
    number = size.removesuffix("b")
    return (family or path.stem, int(number)) if number.isdigit() else (path.stem, 0)


def config_of(model: Any) -> Any:
    """The HuggingFace configuration of a model.

    Args:
        model: a configuration, which is returned as it is; or the name of a preset, a directory, a `config.json`, or a hub
            name, tried in this order.

    Raises:
        ShardError: there is none, or it needs code of its own, which is never run.

    Example:
        >>> config_of("tiny").model_type
        'llama'
    """
    if isinstance(model, (str, Path)) and str(model):
        source = _HERE / f"{model}.json" if str(model) in names() else _own_file(Path(model).expanduser())
        return _from_hub(str(model)) if source is None else _from_file(source)
    from transformers import PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    raise ShardError(f"{model!r} is not a model: give {_choices()}")


def _choices() -> str:
    return f"a preset ({', '.join(names())}), a directory or config.json, or a hub name that can be reached from here"


def _from_file(source: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source.absolute()), trust_remote_code=False)
    except Exception as error:
        raise ShardError(f"{source} is not a configuration that transformers can read: {_first_line(error)}") from error


def _from_hub(name: str) -> Any:
    """The configuration of a hub name, from the hub or from this machine, where an earlier call may have stored it.

    The hub gets one short request first. transformers alone would try for half a minute to reach it.
    """
    unknown = f"{name} is not a preset, a file or a directory"
    if (close := nearest(name, names())) and "/" not in name and not _is_stored(name):
        raise ShardError(f"{unknown}: did you mean the preset {close!r}? Else give {_choices()}")
    offline = _unreachable(name)
    if offline is not None and not _is_stored(name):
        raise ShardError(f"{unknown}, and the hub cannot be reached: {_first_line(offline)}; give {_choices()}") from offline
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=offline is not None)
    except Exception as error:
        raise ShardError(f"{unknown}, and could not be loaded from the hub: {_first_line(error)}; give {_choices()}") from error


def _is_stored(name: str) -> bool:
    """Whether an earlier call has stored the configuration of a hub name on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _unreachable(name: str) -> Exception | None:
    """Why the hub does not answer. An answer that is an error, such as 404, is an answer: transformers explains it better."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _own_file(path: Path) -> Path | None:
    """The `config.json` at a path; None if nothing is there, so that it must be a hub name."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        if path.is_dir():
            raise ShardError(f"{path}: the directory has no config.json")
        return None
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ShardError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ShardError(f'{file}: no "model_type" in it, so it is not a HuggingFace configuration')
    return file


def build(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the causal language model of a configuration, without memory for its weights.

    Args:
        config: a HuggingFace configuration. It is copied.
        dtype: of the parameters; by default float32.

    Returns:
        The model. Its parameters are on meta, its buffers on the CPU with their values.

    Raises:
        ShardError: transformers has no causal language model for this configuration.

    Example:
        >>> next(build(config_of("llama-65b")).parameters()).device
        device(type='meta')
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    # Releases before 4.56 have another name for it.
    key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    with _parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **{key: dtype or torch.float32})
        except (ValueError, KeyError, ImportError) as error:
            raise ShardError(f"no causal language model from this {type(config).__name__}: {error}") from error
    model.config.architectures = [type(model).__name__]
    return model


def constructed(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The values that a model's constructor gives its small parameters, such as the weight of a norm.

    Returns:
        Parameter name -> value in float32, on the CPU. Empty for a model that cannot be built from only `model.config`.
    """
    import torch

    config = getattr(model, "config", None)
    if config is None:
        return {}
    with _parameters_on_meta(but_up_to=SMALL):
        torch.manual_seed(seed)
        try:
            again = type(model)(copy.deepcopy(config))
        except Exception:
            return {}
    return {name: param.detach().float() for name, param in again.named_parameters() if not param.is_meta}


@contextlib.contextmanager
def _parameters_on_meta(but_up_to: int = 0) -> Iterator[None]:
    """Within, parameters of more than `but_up_to` elements that this thread registers are moved to meta.

    A parameter that is registered twice stays one. Before it is moved it is on the CPU, uninitialized: this takes address
    space, but no memory. Everything else is computed on the CPU, whatever the caller's default device is.
    """
    import torch
    from torch import nn
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.utils.weak import WeakTensorKeyDictionary

    own_thread = threading.get_ident()  # the hook is global, and other threads may build models too
    replaced = WeakTensorKeyDictionary()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != own_thread or parameter.is_meta or parameter.numel() <= but_up_to:
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
    """The values of all buffers of a model, by name.

    Buffers on meta have no values. Theirs come from building the model again, on the CPU.

    Raises:
        ShardError: a buffer is on meta, and the model cannot be built from only `model.config`.
    """
    own = dict(model.named_buffers(remove_duplicate=False))
    absent = [name for name, buffer in own.items() if buffer.is_meta]
    if not absent:
        return own
    config = getattr(model, "config", None)
    advice = "build the model with its buffers on a real device"
    if config is None:
        raise ShardError(f"{type(model).__name__}: buffer {absent[0]} is on meta, and no config says what is in it: {advice}")
    with _parameters_on_meta():
        try:
            again = dict(type(model)(copy.deepcopy(config)).named_buffers(remove_duplicate=False))
        except Exception as error:
            raise ShardError(
                f"{type(model).__name__}: buffer {absent[0]} is on meta, and the model cannot be built from its config: "
                f"{type(error).__name__}: {error}; {advice}"
            ) from error
    for name in absent:
        if name not in again or again[name].shape != own[name].shape or again[name].is_meta:
            raise ShardError(f"{type(model).__name__}: buffer {name} is on meta and its config does not determine it: {advice}")
        own[name] = again[name].to(own[name].dtype)
    return own
