"""A fake twin of the caller's model: the same modules with tensors that have shapes and no data. The model is not touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp import presets
from shardcomp.capture.copying import copy_model
from shardcomp.capture.rotary import follow_positions
from shardcomp.errors import CaptureError
from shardcomp.ir.program import Buffer, Parameter
from shardcomp.torch_private import FakeTensor, FakeTensorMode

_EXPERTS_OF_ANY_DTYPE = (None, "eager", "batched_mm")


class Twin:
    """`module`: the copy. Its floating parameters have the compute dtype; floating buffers float32, or float64 under that.

    training: the mode of all modules; None leaves each in its own.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, mode: FakeTensorMode, training: bool | None) -> None:
        self.name = type(model).__name__
        self._originals: dict[int, Tensor] = {}
        # `copy_model` puts what is in here in the place of the model's tensors.
        memo: dict[int, Any] = {}
        with mode:
            for parameter in model.parameters():
                fake = _empty(parameter, dtype)
                memo[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for tensor in [*model.buffers(), *_plain_tensors(model)]:
                if id(tensor) not in memo:
                    memo[id(tensor)] = _empty(tensor, buffer_dtype(dtype))
                    self._originals[id(memo[id(tensor)])] = tensor
        try:
            self.module = copy_model(model, memo)
        except Exception as error:
            raise CaptureError(f"{type(model).__name__} cannot be copied, which a capture needs: {error}") from error
        # `_originals` goes by id, so the fake tensors must live as long as it.
        self._keep = memo
        if training is not None:
            self.module.train(training)
        for module in self.module.modules():
            # It changes no number, and a graph has no place for it. The policy's option `recompute` does the same.
            if getattr(module, "gradient_checkpointing", False) is True:
                module.gradient_checkpointing = False
        for config in configs(self.module):
            config.use_cache = False
            config.return_dict = True
        self.follows_positions = follow_positions(self.module, dtype)
        """Whether the model has rotary frequencies that depend on the positions of a call."""

    def original(self, fake: Tensor) -> Tensor | None:
        """The caller's tensor that a fake one represents."""
        return self._originals.get(id(fake))

    def set_attention(self, name: str) -> None:
        for config in configs(self.module):
            config._attn_implementation = name


def buffer_dtype(compute: torch.dtype) -> torch.dtype:
    """What floating buffers are computed in: rotary frequencies lose their meaning in bfloat16."""
    return torch.float64 if compute == torch.float64 else torch.float32


def configs(model: nn.Module) -> Iterator[Any]:
    """Every distinct configuration that a module of the model reads."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config


def experts_of_any_dtype(model: nn.Module, name: str) -> bool:
    """Have transformers' implementation `name` compute a mixture's experts where the one that is set, such as grouped_mm,
    takes no float64. Returns whether there was one."""
    narrow = [
        config for config in configs(model) if getattr(config, "_experts_implementation", None) not in _EXPERTS_OF_ANY_DTYPE
    ]
    for config in narrow:
        config._experts_implementation = name
    return bool(narrow)


def parameters_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Parameter]:
    """Every parameter once, under its first name."""
    names: dict[int, list[str]] = {}
    params: dict[int, nn.Parameter] = {}
    # With duplicates, so that a tied weight has all its names: the first is its own, the others are aliases.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        params[id(parameter)] = parameter
    parameters = {}
    for key, (name, *aliases) in names.items():
        p = params[key]
        parameters[name] = Parameter(name, tuple(p.shape), _cast(p.dtype, dtype), p.requires_grad, tuple(aliases))
    return parameters


def buffers_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Buffer]:
    """Every buffer with its value: the caller's, or computed anew where the caller's has none."""
    buffers: dict[str, Buffer] = {}
    computed: dict[str, Tensor] | None = None
    for path, module in model.named_modules():
        for short, tensor in module._buffers.items():
            if tensor is None:
                continue
            name = f"{path}.{short}" if path else short
            # A model on meta: rotary frequencies and the like follow from its configuration.
            if not has_data(tensor):
                computed = presets.buffers_of(model) if computed is None else computed
                if name not in computed:
                    raise CaptureError(f"the buffer {name} is on meta and the model's configuration does not say its value")
                tensor = computed[name]
            value = tensor.detach().to("cpu", _cast(tensor.dtype, buffer_dtype(dtype)), copy=True)
            buffers[name] = Buffer(name, value, short not in module._non_persistent_buffers_set)
    return buffers


def has_data(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module holds as ordinary attributes."""
    for module in model.modules():
        yield from (attribute for attribute in vars(module).values() if isinstance(attribute, Tensor))


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=_cast(like.dtype, dtype), device="cpu")


def _cast(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return dtype if own.is_floating_point else own
