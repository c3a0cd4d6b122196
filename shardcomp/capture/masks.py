"""What a model's attention mask means: HuggingFace's mask functions, opened, and the token that carries the answer.

A model asks the mask registry for a mask and hands it to its attention unseen. Under capture it gets a `MaskToken`, which
names the kind of mask and holds its [b, s] tensors. A model that looks into it instead gets a TypeError, and is captured with
its own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor


class UnclearMask(Exception):
    """A mask that cannot be told apart from the outside; the model's own attention is captured instead."""


@dataclass(frozen=True, eq=False)
class Mask:
    """What a query sees. causal, window: as in `kernels.attention`. segment: [b, s] int64 or None; a query sees the keys of
    its own segment, and numbers never decrease along s. key_mask: [b, s] bool or None. restarts: positions count from zero in
    every segment."""

    causal: bool = False
    window: int | None = None
    segment: Tensor | None = None
    key_mask: Tensor | None = None
    restarts: bool = False


class MaskToken:
    """Stands for a mask on its way from the registry to the attention. It has no arithmetic: any other use is a TypeError."""

    def __init__(self, mask: Mask, misused: Callable[[str], None]) -> None:
        self.__dict__.update(_mask=mask, _misused=misused)

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for such names, as `copy` does, and takes only an AttributeError for a no.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._refuse(f"reads .{name} of it")

    def __getitem__(self, index: Any) -> Any:
        self._refuse("indexes it")

    def __bool__(self) -> bool:
        self._refuse("takes it as a truth value")

    def __eq__(self, other: object) -> bool:
        self._refuse("compares it")

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        token = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        token._refuse(f"computes with it ({getattr(func, '__name__', func)})")

    def _refuse(self, what: str) -> NoReturn:
        self._misused(what)
        raise TypeError(f"a model under capture {what}: this is an attention mask that only an attention function can read")


def mask_of(token: MaskToken) -> Mask:
    """What a token stands for."""
    return token.__dict__["_mask"]


_MODULE = "transformers.masking_utils"


def classify(function: Callable[..., Any], batch: Any, length: Any, padding: Tensor | None) -> Mask:
    """What a mask function of HuggingFace means, for a call of [batch, length] tokens; `padding` is its 2-D attention mask.

    Functions are nested closures; each is known by its name and opened. Raises UnclearMask for one that is not.
    """
    mask = _open(function, batch, length)
    if padding is not None:
        mask = _both(mask, Mask(key_mask=padding.to(torch.bool)))
    if mask.window is not None and not mask.causal:
        raise UnclearMask("a window that is not causal")
    if mask.restarts and mask.segment is None:
        raise UnclearMask("positions of packed sequences without the mask that keeps these apart")
    return mask


def _open(function: Callable[..., Any], batch: Any, length: Any) -> Mask:
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
    maker = name.partition(".")[0]
    # A nested function's qualname begins with the function that made it: "and_masks.<locals>.and_mask".
    if module != _MODULE or maker not in _KINDS:
        raise UnclearMask(f"the mask function {module}.{maker} is not known")
    return _KINDS[maker](_closure(function), batch, length)


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _and(closure: dict[str, Any], batch: Any, length: Any) -> Mask:
    mask = Mask()
    for function in closure["mask_functions"]:
        mask = _both(mask, _open(function, batch, length))
    return mask


def _chunks(closure: dict[str, Any], batch: Any, length: Any) -> Mask:
    # Some models attend within chunks: tokens of one chunk are a segment. Padding on the left moves the borders.
    position = torch.arange(length).expand(batch, -1)
    if "left_padding" in closure:
        position = position - closure["left_padding"].unsqueeze(1)
    return Mask(segment=position // closure["chunk_size"])


def _remapped(closure: dict[str, Any], batch: Any, length: Any) -> Mask:
    """Positions that restart with each packed sequence. HuggingFace joins this with the mask that keeps these sequences apart,
    and within one of them positions are in the order of the tokens."""
    mask = _open(closure["mask_function"], batch, length)
    if mask.segment is not None or mask.key_mask is not None:
        raise UnclearMask("packed sequences under a mask that is itself made of segments")
    return replace(mask, restarts=True)


def _without_offsets(closure: dict[str, Any], batch: Any, length: Any) -> Mask:
    if any(not isinstance(closure[name], int) or closure[name] != 0 for name in ("q_offset", "kv_offset")):
        raise UnclearMask("a mask with an offset, as with a cache")
    return _open(closure["mask_function"], batch, length)


_KINDS: dict[str, Callable[[dict[str, Any], Any, Any], Mask]] = {
    "causal_mask_function": lambda closure, batch, length: Mask(causal=True),
    "bidirectional_mask_function": lambda closure, batch, length: Mask(),
    "sliding_window_overlay": lambda closure, batch, length: Mask(window=closure["sliding_window"]),
    "chunked_overlay": _chunks,
    "padding_mask_function": lambda closure, batch, length: Mask(key_mask=closure["padding_mask"].to(torch.bool)),
    "packed_sequence_mask_function": lambda closure, batch, length: Mask(segment=closure["packed_sequence_mask"]),
    "remap_positions_for_packed_sequence": _remapped,
    "add_offsets_to_mask_function": _without_offsets,
    "and_masks": _and,
}
"""The function that makes a mask function -> what it means, given what it closes over.

A union of masks (`or_masks`) has no name among `Mask`'s fields, whatever it is a union of."""


def _both(a: Mask, b: Mask) -> Mask:
    """The keys that both masks show."""
    windows = [m.window for m in (a, b) if m.window is not None]
    return replace(
        a,
        causal=a.causal or b.causal,
        restarts=a.restarts or b.restarts,
        window=min(windows, default=None),
        # Neither number decreases along s, so their sum stays the same exactly where both do.
        segment=a.segment if b.segment is None else b.segment if a.segment is None else a.segment + b.segment,
        key_mask=a.key_mask if b.key_mask is None else b.key_mask if a.key_mask is None else a.key_mask & b.key_mask,
    )
