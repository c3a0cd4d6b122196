"""Exports that tests share: what torch.export gives for a model of transformers depends on its structure alone, and takes most
of the time of a lowering. Many tests lower equal models under other plans; each worker exports such a model once.

A test that is about the capture itself is marked `exports_anew`; `make long` exports everything anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo.config
from torch import nn

from shardcomp import capture

_MOST = 100
_PLAIN = (bool, int, float, str, type(None))

shared = True
"""Whether the test that runs now takes part."""
_held: OrderedDict[Hashable, Any] = OrderedDict()


def share() -> None:
    """Have the exports of this process be looked up first. They are of small models, for which torch's cache of what operators
    give for fake tensors costs more than it saves."""
    torch._dynamo.config.fake_tensor_cache_enabled = False
    export = capture._first_that_exports

    def first(model: nn.Module, *how: Any) -> Any:
        key = _key(model, how) if shared else None
        if key is None:
            return export(model, *how)
        if key not in _held:
            _held[key] = export(model, *how)
            if len(_held) > _MOST:
                _held.popitem(last=False)
        _held.move_to_end(key)
        found = _held[key]
        return replace(found, degraded=list(found.degraded))  # which the caller adds to

    first_typed: Callable[..., Any] = first
    capture._first_that_exports = first_typed


def _key(model: nn.Module, how: tuple[Any, ...]) -> Hashable | None:
    """Everything that an export reads, but the code of transformers; None for a model with code of a test's own."""
    modules = list(model.named_modules())
    classes = {type(each) for _, each in modules}
    own = any(not each.__module__.startswith(("transformers.", "torch.nn.")) for each in classes)
    own |= any("forward" in vars(each) for _, each in modules)
    hooks = any(each._forward_hooks or each._forward_pre_hooks for _, each in modules)
    config = getattr(model, "config", None)
    if own or hooks or config is None:
        return None
    plain = tuple(
        (name, type(each), tuple((key, held) for key, held in vars(each).items() if isinstance(held, _PLAIN)))
        for name, each in modules
    )
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tensors = tuple(
        (name, first.setdefault(id(t), name), tuple(t.shape), t.dtype, t.requires_grad, t.is_meta) for name, t in named
    )
    settings = (config.to_json_string(use_diff=False), config._attn_implementation, torch.get_default_dtype())
    return how, settings, plain, tensors
