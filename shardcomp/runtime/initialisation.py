"""Initial weights by the model's own rule, one parameter at a time: the same numbers on every topology, without a whole model.

The generator is seeded by (seed, parameter name), and numbers are drawn in float32 for the whole parameter, so they depend neither
on how it is cut nor on the precision.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from shardcomp.errors import ShardError

_lock = threading.Lock()


def initialise(name: str, model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The initial value of the parameter `name` of `model`, whose own weights may be on meta and are not read.

    The model's `_init_weights` is applied to the parameter's module and then to each module around it, as the model does when it
    is built; without one, the module's `reset_parameters`. Raises ShardError where a model has neither.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters[leaf]
    assert held is not None
    value = nn.Parameter(torch.empty(held.shape, dtype=torch.float32), requires_grad=False)
    around = list(_around(model, path))
    rules = [(part, rule) for part in around if (rule := _rule(around[around.index(part) :])) is not None]
    # The generator is the process's own, and the module holds the value for a moment.
    with _lock, torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1)
        marks = [(part, vars(part).pop("_is_hf_initialized")) for part in around if "_is_hf_initialized" in vars(part)]
        module._parameters[leaf] = value
        try:
            if rules:
                value.fill_(float("nan"))
                for part, rule in rules:
                    rule(part)
            if not rules or bool(value.isnan().any()):
                _reset(module, name)
        finally:
            module._parameters[leaf] = held
            for part, mark in marks:
                part._is_hf_initialized = mark  # type: ignore[assignment]
    return value.detach().to(dtype)


def _reset(module: nn.Module, name: str) -> None:
    """PyTorch's own rule, for what a model leaves to it."""
    rule = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if rule is None:
        raise ShardError(
            f"{name}: neither the model's _init_weights nor a reset_parameters of {type(module).__name__} sets it; "
            "give the model real weights, or checkpoint="
        )
    rule()


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at `path` and those around it, innermost first."""
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]
    yield model


def _rule(around: list[nn.Module]) -> Callable[[nn.Module], None] | None:
    """The `_init_weights` of the nearest model around."""
    return next((rule for part in around if (rule := getattr(part, "_init_weights", None)) is not None), None)


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Give a dense model, in place, the numbers that every topology starts from. Parameters on meta become real on the CPU."""
    from shardcomp.presets import buffers_of

    if any(buffer.is_meta for buffer in model.buffers()):
        values = buffers_of(model)
        for path, module in model.named_modules():
            for name in module._buffers:
                module._buffers[name] = values[f"{path}.{name}" if path else name].clone()
    made: dict[int, nn.Parameter] = {}
    for name, p in list(model.named_parameters()):
        value = initialise(name, model, seed, p.dtype)
        if p.is_meta:
            made[id(p)] = nn.Parameter(value, p.requires_grad)
        else:
            with torch.no_grad():
                p.copy_(value)
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None and id(held) in made:
                module._parameters[name] = made[id(held)]
    return model
