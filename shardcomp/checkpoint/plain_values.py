"""Values of optimizers, schedulers and training loops as JSON, so that loading a checkpoint unpickles nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardcomp.checkpoint.storage import DTYPES, NAMED
from shardcomp.errors import CheckpointError


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it, from which `unplain` returns the same value, to the bit.

    Plain values are numbers, also in 0-d tensors, texts, and lists, tuples and dictionaries of them. Raises CheckpointError for
    any other. where: what the value is, for the message.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and not value.dim() and value.dtype in DTYPES:
        return {"__tensor__": [value.item(), DTYPES[value.dtype]]}
    if type(value) is list:
        return [plain(item, where) for item in value]
    if type(value) is tuple:
        return {"__tuple__": [plain(item, where) for item in value]}
    if type(value) is dict and all(type(key) is str and not key.startswith("__") for key in value):
        return {key: plain(item, where) for key, item in value.items()}
    if type(value) in (dict, Counter):
        pairs = [[plain(key, where), plain(item, where)] for key, item in value.items()]
        return {"__counter__" if isinstance(value, Counter) else "__dict__": pairs}
    raise CheckpointError(
        f"{where} cannot be saved: {type(value).__name__} is not a plain value; only numbers, texts, lists, tuples and "
        "dictionaries of them are, so that loading unpickles nothing"
    )


def unplain(value: Any) -> Any:
    """The value that `plain` took."""
    if isinstance(value, list):
        return [unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    [kind, *more] = value or [""]
    if more or kind not in _KINDS:
        return {key: unplain(item) for key, item in value.items()}
    return _KINDS[kind](value[kind])


_KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "__tensor__": lambda pair: torch.tensor(pair[0], dtype=NAMED[pair[1]]),
    "__tuple__": lambda items: tuple(unplain(items)),
    "__dict__": lambda items: dict(unplain(items)),
    "__counter__": lambda items: Counter(dict(unplain(items))),
}
