"""Fresh weights: each parameter by its model's own initialization rule, from a generator seeded by (seed, parameter name).

The numbers depend on the model, the seed and the name only, not on the topology, the precision or the order. A small parameter
that no rule sets has the numbers of the model's constructor.
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
    """The initial value of one full parameter, on the CPU: drawn in float32, then cast to `dtype`.

    name: any name of a tied weight; the first one is the seed. model: has the rule. Neither it, with weights on meta or real,
    nor the state of the random generators changes. Raises ShardError where the model has no rule for this parameter.
    """
    first, shape, floating = _find(name, model)
    if not floating:
        raise ShardError(f"{first}: not a floating parameter, so no rule initializes it: give its value, or checkpoint=")
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
            param = chain[-1]._parameters[leaf]
            if param is not None and param.shape == shape and not param.isnan().any():
                return param.detach().to(dtype)
    with _drawing:
        value = _by_constructor(model, seed).get(first)
    if value is not None and value.shape == shape:
        return value.to(dtype)
    raise ShardError(
        f"{first}: neither {type(model).__name__} nor {type(chain[-1]).__name__} has a rule that initializes it "
        "(_init_weights, reset_parameters): give a model with real weights, or checkpoint="
    )


def _by_constructor(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The numbers of a model's constructor, which runs once for all its parameters."""
    known = _constructed.setdefault(model, {})
    if seed not in known:
        known[seed] = constructed(model, seed)
    return known[seed]


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Give a dense model the numbers that every topology starts from.

    Args:
        model: real parameters are filled in place, in their dtype and on their device. Parameters and buffers on meta become
            real on the CPU.
        seed: as the policy's `seed`.

    Returns:
        The model.

    Raises:
        ShardError: where a parameter has no initialization rule.

    Example:
        >>> import torch
        >>> model = shardcomp.initialize(torch.nn.Linear(2, 2, device="meta"), seed=0)
        >>> model.weight.is_meta
        False
    """
    rules = _on_meta(model)
    buffers = buffers_of(model)
    real: dict[int, Tensor] = {}
    replaced = []  # ids are unique only while the tensors live
    for name, parameter in model.named_parameters():
        value = initialize_parameter(name, rules, seed, parameter.dtype)
        if parameter.is_meta:
            real[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            replaced.append(parameter)
        else:
            with torch.no_grad():
                parameter.copy_(value)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta and id(buffer) not in real:
            real[id(buffer)] = buffers[name]
            replaced.append(buffer)
    for module in model.modules():
        # Attributes too: some releases keep a buffer's first value beside it.
        for tensors in (module._parameters, module._buffers, module.__dict__):
            tensors.update({k: real[id(tensor)] for k, tensor in tensors.items() if id(tensor) in real})  # type: ignore[arg-type]
    return model


def _find(name: str, model: nn.Module) -> tuple[str, torch.Size, bool]:
    """The first name of a parameter, its shape, and whether it is floating."""
    try:
        path, _, leaf = name.rpartition(".")
        param = model.get_submodule(path)._parameters[leaf]
    except (AttributeError, KeyError):
        param = None
    if param is None:
        raise ShardError(f"{type(model).__name__} has no parameter {name}")
    first = next(known for known, parameter in model.named_parameters() if parameter is param)
    return first, param.shape, param.is_floating_point()


def _stand_in(model: nn.Module, path: str, leaf: str, value: nn.Parameter) -> list[nn.Module]:
    """The modules from the root to the owner of a parameter, as copies with `value` in its place.

    Everything else is the model's own, except for the copies' buffers: a rule that sets them must not change the model.
    """
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
    twin._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    return twin


def _apply_rules(chain: list[nn.Module]) -> None:
    """Run the rules that concern the last module: for it, then for each ancestor, the rule of the nearest module with one."""
    for depth in range(len(chain), 0, -1):
        rule = next((m._init_weights for m in reversed(chain[:depth]) if callable(getattr(m, "_init_weights", None))), None)
        if rule is not None:
            rule(chain[depth - 1])  # type: ignore[operator]


@contextlib.contextmanager
def _lent_generator() -> Iterator[torch.Generator]:
    """The CPU generator, whose state is put back. A default device that the caller has set does not apply within."""
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
