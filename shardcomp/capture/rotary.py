"""Rotary embeddings whose frequencies depend on the positions of a call: transformers' `longrope` and `dynamic`.

transformers' decorator `dynamic_rope_update` writes them into a buffer before each forward, and so the model remembers what it
was called with. In a twin they are a value of the graph instead, a function of the largest position:

    frequencies = where(position_ids.amax() + 1 > trained_length, those for long sequences, those it was trained with)

So every call gives what a model gives that was never called before, which for `longrope` is what any model gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import modeling_rope_utils

from shardcomp.ir.precision import Widened
from shardcomp.torch_private import tree_map

_DECORATOR = "dynamic_rope_update"
_FIXED = "default"
"""A type of rotary embedding that the decorator leaves alone."""


def follow_positions(model: nn.Module, dtype: torch.dtype) -> bool:
    """Have the rotary embeddings of a twin compute their frequencies in the graph; whether it has any that change.

    model: a copy that is used only for a capture. dtype: what the capture computes in.
    """
    rotary = [module for module in model.modules() if _is_decorated(type(module)) and list(_changing(module))]
    for module in rotary:
        module.forward = _Rotary(module, dtype).forward
    return bool(rotary)


def _is_decorated(kind: type) -> bool:
    """Whether a class, or one that it derives from, has a forward with transformers' decorator, under others if need be."""
    return any(
        code is not None and code.co_qualname.startswith(f"{_DECORATOR}.") and _home(function) == modeling_rope_utils.__name__
        for base in kind.__mro__
        for function in _unwrapped(vars(base).get("forward"))
        if (code := getattr(function, "__code__", None)) is not None
    )


def _home(function: Any) -> str:
    """The module whose code a function is; `functools.wraps` changes its `__module__` but not its globals."""
    return str(function.__globals__.get("__name__"))


def _unwrapped(function: Any) -> Iterator[Any]:
    """A function and those that it wraps."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _changing(module: nn.Module) -> Iterator[str | None]:
    """The kinds of layers whose frequencies change with the positions; None stands for all layers alike."""
    kinds = getattr(module, "rope_type", None)
    for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            yield layer_type


class _Rotary:
    """The forward of one rotary embedding of a twin."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.own: Callable[..., Any] = module.forward
        self.signature = inspect.signature(self.own)
        wide = Widened() if dtype == torch.float64 else nullcontext()
        with torch.no_grad(), wide:
            # Outside of the export, so that they are one constant of the graph.
            self.long = {layer: self._long(layer) for layer in _changing(module) if self._kind(layer) == "longrope"}

    def _kind(self, layer_type: str | None) -> str:
        kinds: Any = self.module.rope_type
        return str(kinds if layer_type is None else kinds[layer_type])

    def _initial(self, layer_type: str | None, length: Any) -> tuple[Tensor, Any]:
        """The frequencies for a length, and the factor of cos and sin, by transformers' function of this kind."""
        compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[self._kind(layer_type)]
        option = {} if layer_type is None else {"layer_type": layer_type}
        return compute(self.module.config, torch.device("cpu"), seq_len=length, **option)  # type: ignore[arg-type,no-any-return]

    def _trained_length(self, layer_type: str | None) -> int:
        """The longest sequence that keeps the frequencies which the model was trained with."""
        if "dynamic" in self._kind(layer_type):
            return int(self.module.original_max_seq_len)  # type: ignore[arg-type]
        config: Any = self.module.config
        rope = getattr(config, "rope_parameters", None) or {}
        rope = rope if layer_type is None else rope[layer_type]
        # Releases before 5.0 have it beside the other settings of the configuration.
        beside = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        return int(rope.get("original_max_position_embeddings") or beside)

    def _long(self, layer_type: str | None) -> Tensor:
        known = getattr(self.module, f"{_prefix(layer_type)}long_inv_freq", None)
        return self._initial(layer_type, self._trained_length(layer_type) + 1)[0] if known is None else known

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the module's own forward, which it calls with the frequencies for these positions."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        layer_type, positions = arguments.get("layer_type"), arguments.get("position_ids")
        if positions is None or layer_type not in tuple(_changing(self.module)):
            return self.own(*args, **kwargs)
        trained = self._trained_length(layer_type)
        with torch.no_grad():
            # `amax` has a rule for how it may be split, `max` has none.
            length = positions.amax() + 1
            is_long = length > trained
            changed = self._values(layer_type, length, is_long, trained)
        with _Set(self.module, changed), _Answers(trained, True) as answers:
            result = self.own(*args, **kwargs)
        if not answers.asked:
            return result
        # The model's own code asks for the length as well: both of its answers, of which the positions choose one.
        with _Set(self.module, changed), _Answers(trained, False):
            short = self.own(*args, **kwargs)
        return tree_map(lambda a, b: torch.where(is_long, a, b), result, short)

    def _values(self, layer_type: str | None, length: Tensor, is_long: Tensor, trained: int) -> dict[str, Any]:
        """The attributes that the module has for one call: what the decorator would write, and a type that keeps it still."""
        module: Any = self.module
        prefix = _prefix(layer_type)
        kinds = module.rope_type
        values: dict[str, Any] = {"rope_type": _FIXED if layer_type is None else {**kinds, layer_type: _FIXED}}
        if layer_type in self.long:
            frequencies = self.long[layer_type]
        else:
            with _Answers(trained, True):
                frequencies, scaling = self._initial(layer_type, length)
            if layer_type is None and scaling != module.attention_scaling:
                values["attention_scaling"] = torch.where(is_long, scaling, module.attention_scaling)
        values[f"{prefix}inv_freq"] = torch.where(is_long, frequencies, getattr(module, f"{prefix}original_inv_freq"))
        return values


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


class _Set:
    """Within, a module has these attributes, before its buffers; afterwards the attributes that it had."""

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        self.attributes, self.values = vars(module), values

    def __enter__(self) -> None:
        self.before = {name: self.attributes[name] for name in self.values if name in self.attributes}
        self.attributes.update(self.values)

    def __exit__(self, *failure: object) -> None:
        for name in self.values:
            del self.attributes[name]
        self.attributes.update(self.before)


class _Answers(TorchFunctionMode):
    """Answers the question whether a length, a tensor, is above the trained one: with `is_long`. asked: whether it was put."""

    def __init__(self, trained: int, is_long: bool) -> None:
        super().__init__()
        self.trained, self.is_long, self.asked = trained, is_long, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, or answer it."""
        name = getattr(func, "__name__", "").strip("_")
        if name in ("gt", "lt", "le", "bool") and _is_number(args[0]):
            if name == "bool":
                return True  # a length is not zero
            if type(args[1]) is int and args[1] == self.trained:
                self.asked = True
                return self.is_long if name == "gt" else not self.is_long
        return func(*args, **(kwargs or {}))


def _is_number(tensor: Any) -> bool:
    """Whether a tensor represents one whole number."""
    return isinstance(tensor, Tensor) and tensor.dim() == 0 and tensor.dtype == torch.int64
