"""Fresh weights: each parameter by its model's own initialisation rule, from a generator seeded by (seed, parameter name); a
small one that no rule sets stays as the model's constructor leaves it.

So the numbers depend on the model, the seed and the name only: not on the topology, the precision, or the order of asking.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shardcomp.errors import ShardError
from shardcomp.presets import buffers_of, constructed

_drawing = threading.Lock()
"""The rules draw from the process's CPU generator, which is lent to one parameter at a time."""


_constructed: WeakKeyDictionary[nn.Module, dict[int, dict[str, Tensor]]] = WeakKeyDictionary()


def initialize_parameter(name: str, model: nn.Module, seed: int, dtype: torch.dtype) -> Tensor:
    """The initial value of one parameter, whole, on the CPU: drawn in float32, then cast to `dtype`.

    name: any name of a tied weight; the first one counts. `model` says which rule and is left as it was, its weights on meta
    or real; so is the state of the random generators. Raises ShardError where the model has no rule for this parameter.
    """
    first, shape, floating = _find(name, model)
    if not floating:
        raise ShardError(f"{first}: not a floating parameter, so no rule initialises it: give its value, or checkpoint=")
    if not all(parameter.is_meta for parameter in model.parameters()):
        model = _on_meta(model)  # a rule may also set this parameter's neighbours
    key = int.from_bytes(hashlib.sha256(f"{seed}/{first}".encode()).digest()[:8], "little") >> 1
    path, _, leaf = first.rpartition(".")
    with _drawing, _lent_generator() as generator, torch.no_grad():
        # NaN shows what no rule has set. What a constructor draws first, a rule may then change in part.
        for reset in (False, True):
            generator.manual_seed(key)
            value = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32, device="cpu"), requires_grad=False)
            chain = _stand_in(model, path, leaf, value)
            own_reset = getattr(chain[-1], "reset_parameters", None)
            if reset and not callable(own_reset):
                break
            try:
                if reset:
                    own_reset()  # type: ignore[misc]
                _apply_rules(chain)
            except Exception as problem:
                raise ShardError(
                    f"{first}: the rule of {type(model).__name__} fails when this parameter is alone: "
                    f"{type(problem).__name__}: {problem}; give a model with real weights, or checkpoint="
                ) from problem
            found = chain[-1]._parameters[leaf]
            if found is not None and found.shape == shape and not found.isnan().any():
                return found.detach().to(dtype)
    with _drawing:
        value = _by_constructor(model, seed).get(first)
    if value is not None and value.shape == shape:
        return value.to(dtype)
    raise ShardError(
        f"{first}: neither {type(model).__name__} nor {type(chain[-1]).__name__} has a rule that initialises it "
        "(_init_weights, reset_parameters): give a model with real weights, or checkpoint="
    )


def _by_constructor(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """What no rule sets stays as the constructor left it; built once for all parameters of a model."""
    known = _constructed.setdefault(model, {})
    if seed not in known:
        known[seed] = constructed(model, seed)
    return known[seed]


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Give a dense model the numbers that every topology starts from; returns the model.

    Real parameters are filled in place, in their dtype and on their device; those on meta, and buffers on meta, become real on
    the CPU. Raises ShardError where a parameter has no rule.
    """
    rules = _on_meta(model)
    buffers = buffers_of(model)
    real: dict[int, Tensor] = {}
    kept = []  # an id is one tensor's for as long as the tensor lives
    for name, parameter in model.named_parameters():
        value = initialize_parameter(name, rules, seed, parameter.dtype)
        if parameter.is_meta:
            real[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            kept.append(parameter)
        else:
            with torch.no_grad():
                parameter.copy_(value)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta and id(buffer) not in real:
            real[id(buffer)] = buffers[name]
            kept.append(buffer)
    for module in model.modules():
        # Attributes too: some releases keep a buffer's first value beside it.
        for held in (module._parameters, module._buffers, module.__dict__):
            held.update({name: real[id(tensor)] for name, tensor in held.items() if id(tensor) in real})  # type: ignore[arg-type]
    return model


def _find(name: str, model: nn.Module) -> tuple[str, torch.Size, bool]:
    """The first name of a parameter, its shape, and whether it is floating."""
    try:
        path, _, leaf = name.rpartition(".")
        wanted = model.get_submodule(path)._parameters[leaf]
    except (AttributeError, KeyError):
        wanted = None
    if wanted is None:
        raise ShardError(f"{type(model).__name__} has no parameter {name}")
    first = next(each for each, parameter in model.named_parameters() if parameter is wanted)
    return first, wanted.shape, wanted.is_floating_point()


def _stand_in(model: nn.Module, path: str, leaf: str, value: nn.Parameter) -> list[nn.Module]:
    """The modules from the root to the owner of a parameter as copies that hold `value` in its place; the rest is the model's
    own. The copies' other buffers are their own, so that a rule which also sets those leaves the model alone."""
    chain = [_shallow(model)]
    for part in path.split(".") if path else []:
        child = chain[-1]._modules[part]
        assert child is not None
        chain[-1]._modules[part] = _shallow(child)
        chain.append(chain[-1]._modules[part])  # type: ignore[arg-type]
    chain[-1]._parameters[leaf] = value
    return chain


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._parameters = dict(module._parameters)
    twin._buffers = {name: None if held is None else held.clone() for name, held in module._buffers.items()}
    return twin


def _apply_rules(chain: list[nn.Module]) -> None:
    """The rules that concern the last module: for it and then each ancestor, that of the nearest module around with one."""
    for depth in range(len(chain), 0, -1):
        rule = next((m._init_weights for m in reversed(chain[:depth]) if callable(getattr(m, "_init_weights", None))), None)
        if rule is not None:
            rule(chain[depth - 1])  # type: ignore[operator]


@contextlib.contextmanager
def _lent_generator() -> Iterator[torch.Generator]:
    """The CPU generator, whose state is put back; a default device that the caller has set does not count meanwhile."""
    generator = torch.default_generator
    state = generator.get_state()
    try:
        with torch.device("cpu"):
            yield generator
    finally:
        generator.set_state(state)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy with parameters on meta, tied as in the model."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)
