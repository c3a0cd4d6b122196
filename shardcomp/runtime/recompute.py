"""Recompute: a unit's forward is run again when its backward needs what it saved, in the place of keeping that.

The saved tensors of a unit's call are slots of a frame, which at first hold nothing. The first that the backward asks for runs
the forward again from the unit's inputs, up to the last value that is asked for and no further. A slot dies with the node of
the backward that asked for it, and takes its tensor along, as a saved tensor would.

What `keep` and `once` call is not run again: its result is remembered, and what it saved is taken from its arguments, or
remembered as well where it was made inside. Outside a unit that is computed again both just call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from shardcomp.errors import InternalError
from shardcomp.runtime.random import Streams

Body = Callable[..., Any]


def recompute(body: Body, inputs: Sequence[Any], path: str, random: Streams | None = None) -> Any:
    """`body(*inputs)`, such that the backward computes again what it needs. Nothing but the inputs is kept.

    path: the unit's, for messages. random: what the body draws from, so that it draws the same again; None where it does not.
    Without gradients, or with none for the inputs, this is the call itself.
    """
    graded = [held for held in inputs if isinstance(held, Tensor) and held.requires_grad]
    if not graded or not torch.is_grad_enabled():
        return body(*inputs)
    frame = SavedCall(body, inputs, path, random)
    if _here.made is not None:
        _here.made.append(frame)
    passed = iter(_Border.apply(weakref.ref(frame), *graded))
    given = [next(passed) if isinstance(held, Tensor) and held.requires_grad else held for held in inputs]
    first = _Record(frame)
    with _as_current(first), saved_tensors_hooks(first.pack, _unpack):
        return body(*given)


def keep(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`, whose result is kept where the unit is computed again."""
    run = _here.run
    return function(*args, **kwargs) if run is None else run.call(function, args, kwargs, stored=True)


def once(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`, whose result no saved value depends on: where the unit is computed again, NaN stands for
    it."""
    run = _here.run
    return function(*args, **kwargs) if run is None else run.call(function, args, kwargs, stored=False)


@contextmanager
def saved_calls() -> Iterator[list[SavedCall]]:
    """Collects the frames that this thread makes within, such as those of one micro-batch in one stage."""
    before, _here.made = _here.made, []
    try:
        yield _here.made
    finally:
        _here.made = before


@contextmanager
def split_backward(on: bool = True) -> Iterator[None]:
    """Within, where `on`, the backwards that this thread begins are for the inputs alone: what they computed again is left for
    that of the weights, which comes later. It goes with the graph, or when a frame is told to `drop` it."""
    switch = _here.switch
    before, switch.split = switch.split, on
    try:
        yield
    finally:
        switch.split = before


@dataclass
class _Switch:
    split: bool = False


class _Here(threading.local):
    """What is going on in this thread; ranks may be threads of one process."""

    def __init__(self) -> None:
        self.run: _Record | _Replay | None = None
        self.made: list[SavedCall] | None = None
        # An object, which frames hold: on a GPU a backward runs in a thread of its own.
        self.switch = _Switch()


_here = _Here()


@contextmanager
def _as_current(run: _Record | _Replay) -> Iterator[None]:
    before, _here.run = _here.run, run
    try:
        yield
    finally:
        _here.run = before


class SavedSlot:
    """The place of one tensor that autograd saved. `own`: what cannot be had from the unit's inputs, and is kept."""

    __slots__ = ("__weakref__", "frame", "own", "tensor")

    def __init__(self, frame: SavedCall) -> None:
        self.frame = frame
        self.own = False
        self.tensor: Tensor | None = None


@dataclass
class _Kept:
    """A call that is not run again: its result (None where it is not needed), and which slots it filled, from which of its
    tensor arguments: slot -> (argument, size, stride, offset). drawn: where its random numbers stood afterwards."""

    begin: int
    end: int = 0
    result: Tensor | None = None
    like: tuple[torch.Size, torch.dtype, torch.device] | None = None
    requires_grad: bool = False
    aliases: dict[int, tuple[int, torch.Size, tuple[int, ...], int]] = field(default_factory=dict)
    drawn: Tensor | None = None


class SavedCall:
    """One call of a unit. `inputs` are what it keeps; `runs` counts how often it was computed again."""

    def __init__(self, body: Body, inputs: Sequence[Any], path: str, random: Streams | None) -> None:
        self.body, self.path, self.random = body, path, random
        self.inputs = tuple(held.detach() if isinstance(held, Tensor) else held for held in inputs)
        self.graded = tuple(isinstance(held, Tensor) and held.requires_grad for held in inputs)
        self.state = random.state_dict() if random is not None else {}
        self.switch = _here.switch
        self.slots: list[weakref.ref[SavedSlot]] = []
        self.shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.kept: list[_Kept] = []
        self.runs = 0

    def live(self) -> list[tuple[int, SavedSlot]]:
        """The slots that some backward may still ask for."""
        return [(i, slot) for i, ref in enumerate(self.slots) if (slot := ref()) is not None]

    def held(self) -> Iterator[Tensor]:
        """The tensors that the call keeps for its backward, as long as nothing has been computed again."""
        yield from (held for held in self.inputs if isinstance(held, Tensor))
        yield from (kept.result for kept in self.kept if kept.result is not None)
        yield from (slot.tensor for _, slot in self.live() if slot.tensor is not None)

    def drop(self) -> None:
        """Forget what was computed again. It would be computed once more."""
        for _, slot in self.live():
            if not slot.own:
                slot.tensor = None

    def again(self) -> None:
        """Compute every tensor that is missing."""
        self.runs += 1
        run = _Replay(self)
        inputs = [
            held.detach().requires_grad_(graded) if isinstance(held, Tensor) else held
            for held, graded in zip(self.inputs, self.graded, strict=True)
        ]
        replayed = self.random.replayed(self.state) if self.random is not None else nullcontext()
        try:
            with torch.enable_grad(), replayed, _as_current(run), saved_tensors_hooks(run.pack, _unpack):
                self.body(*inputs)
        except _Enough as enough:
            if enough.run is run:
                return
            raise
        except Exception as failure:
            failure.add_note(f"while {self.path} was computed again for its backward")
            raise
        raise InternalError(f"{self.path}: computed again, it saved fewer values for its backward than before")


class _Enough(Exception):
    """All that a backward asks for has been computed."""

    def __init__(self, run: _Replay) -> None:
        super().__init__()
        self.run = run


class _Record:
    """The forward itself."""

    def __init__(self, frame: SavedCall) -> None:
        self.frame = frame
        self.current: _Kept | None = None
        self.arguments: list[Tensor] = []

    def pack(self, tensor: Tensor) -> SavedSlot:
        frame, slot = self.frame, SavedSlot(self.frame)
        if self.current is not None:
            alias = _alias(tensor, self.arguments)
            if alias is None:
                slot.own, slot.tensor = True, tensor.detach()
            else:
                self.current.aliases[len(frame.slots)] = alias
        frame.slots.append(weakref.ref(slot))
        frame.shapes.append((tensor.shape, tensor.dtype))
        return slot

    def call(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], stored: bool) -> Tensor:
        if self.current is not None:
            return function(*args, **kwargs)
        kept = self.current = _Kept(len(self.frame.slots))
        self.arguments = _tensors(args, kwargs)
        try:
            result = function(*args, **kwargs)
        finally:
            self.current, self.arguments = None, []
        kept.end = len(self.frame.slots)
        kept.like = result.shape, result.dtype, result.device
        kept.requires_grad = result.requires_grad
        kept.result = result.detach() if stored else None
        stream = kwargs.get("random")
        kept.drawn = None if stream is None else stream.generator.get_state()
        self.frame.kept.append(kept)
        return result


class _Replay:
    """The forward run again: fills the slots, in the order in which the first run made them."""

    def __init__(self, frame: SavedCall) -> None:
        self.frame = frame
        self.missing = {i: slot for i, slot in frame.live() if slot.tensor is None}
        self.last = max(self.missing)
        self.at = self.calls = 0

    def pack(self, tensor: Tensor) -> None:
        if self.at in self.missing:
            if self.frame.shapes[self.at] != (tensor.shape, tensor.dtype):
                first = "{1} of {0}".format(*self.frame.shapes[self.at])
                now = f"{tensor.dtype} of {tensor.shape}"
                raise InternalError(f"{self.frame.path}: computed again, a value is {now} that was {first} before")
            self.missing[self.at].tensor = tensor.detach()
        self._advance(self.at + 1)

    def call(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], stored: bool) -> Tensor:
        kept = self.frame.kept[self.calls]
        self.calls += 1
        arguments = _tensors(args, kwargs)
        for slot, (argument, size, stride, offset) in kept.aliases.items():
            if slot in self.missing:
                self.missing[slot].tensor = arguments[argument].detach().as_strided(size, stride, offset)
        self._advance(kept.end)
        if kept.drawn is not None:
            kwargs["random"].generator.set_state(kept.drawn)
        if kept.result is not None:
            return kept.result.detach().requires_grad_(kept.requires_grad)
        assert kept.like is not None
        shape, dtype, device = kept.like
        empty = torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)
        return empty.expand(shape).requires_grad_(kept.requires_grad)

    def _advance(self, to: int) -> None:
        self.at = to
        if to > self.last:
            raise _Enough(self)


def _unpack(slot: SavedSlot) -> Tensor:
    if slot.tensor is None:
        slot.frame.again()
    if slot.tensor is None:
        raise InternalError(f"{slot.frame.path}: computed again, a value that its backward needs was not made")
    return slot.tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [held for held in (*args, *kwargs.values()) if isinstance(held, Tensor)]


def _alias(tensor: Tensor, arguments: list[Tensor]) -> tuple[int, torch.Size, tuple[int, ...], int] | None:
    """Which of the arguments a saved tensor is a view of, and how; None for a tensor of its own."""
    for index, argument in enumerate(arguments):
        shared = tensor.untyped_storage()._cdata == argument.untyped_storage()._cdata
        if shared and tensor.dtype == argument.dtype:
            return index, tensor.shape, tensor.stride(), int(tensor.storage_offset())
    return None


class _Border(torch.autograd.Function):
    """The identity in front of a unit. Its backward is the unit's last: what was computed again is not needed any more."""

    @staticmethod
    def forward(ctx: Any, frame: weakref.ref[SavedCall], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.frame = frame
        ctx.set_materialize_grads(False)
        return tuple(held.view_as(held) for held in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        frame = ctx.frame()
        if frame is not None and not frame.switch.split:
            frame.drop()
        return None, *gradients
