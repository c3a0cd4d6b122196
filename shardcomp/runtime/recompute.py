"""Recompute, also known as activation checkpointing: a unit's forward runs again when its backward needs what it saved.

Autograd stores an empty `SavedSlot` for each tensor that a unit saves. When the backward unpacks the first one, the forward
runs again, from the unit's inputs up to the last tensor that is missing, and fills all slots. A slot dies with the autograd
node that stored it, and its tensor with it, as a saved tensor would.

Selective recompute marks calls in the emitted code. `keep(f, ...)` remembers the result of `f`. `drop(f, ...)` remembers
nothing, since no saved tensor depends on the result. Neither runs `f` again. What `f` itself saved is taken from its arguments,
or remembered where `f` computed it inside. Outside of recompute both only call `f`.

Why not torch.utils.checkpoint: under a split backward it would run the forward up to five times. docs/guide/plans.md
explains the option `recompute`.
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
from shardcomp.torch_private import storage_id

Body = Callable[..., Any]


def recompute(body: Body, inputs: Sequence[Any], path: str, random: Streams | None = None) -> Any:
    """Run `body(*inputs)` so that only the inputs are saved, and the backward recomputes the rest.

    path: the unit's, for messages. random: what the body draws from, to draw the same numbers again; None where it draws none.
    Without gradients, or where no input requires one, this only calls `body`.
    """
    requiring_grad = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not requiring_grad or not torch.is_grad_enabled():
        return body(*inputs)
    call = SavedCall(body, inputs, path, random)
    if _state.calls is not None:
        _state.calls.append(call)
    passed = iter(_UnitEntry.apply(weakref.ref(call), *requiring_grad))
    arguments = [next(passed) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    run = _Record(call)
    with _as_current(run), saved_tensors_hooks(run.pack, _unpack):
        return body(*arguments)


def keep(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`; where the unit is recomputed, its result is remembered and not computed again."""
    run = _state.run
    return function(*args, **kwargs) if run is None else run.call(function, args, kwargs, stored=True)


def drop(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function(*args, **kwargs)`, where no saved tensor depends on the result: a recompute uses NaN in its place."""
    run = _state.run
    return function(*args, **kwargs) if run is None else run.call(function, args, kwargs, stored=False)


once = drop
"""The name of `drop` in sources that earlier releases saved."""


@contextmanager
def saved_calls() -> Iterator[list[SavedCall]]:
    """Collect the calls that this thread saves within, such as the calls of one micro-batch in one stage."""
    before, _state.calls = _state.calls, []
    try:
        yield _state.calls
    finally:
        _state.calls = before


@contextmanager
def split_backward(on: bool = True) -> Iterator[None]:
    """Within, where `on`, the backwards that this thread begins compute the gradients of inputs only.

    What they recompute stays for the weight pass that follows, and is freed with the graph, or by `SavedCall.free_recomputed`.
    """
    switch = _state.switch
    before, switch.split = switch.split, on
    try:
        yield
    finally:
        switch.split = before


@dataclass
class _Switch:
    split: bool = False


class _ThreadState(threading.local):
    """The state of this thread. Ranks may be threads of one process."""

    def __init__(self) -> None:
        self.run: _Record | _Replay | None = None
        self.calls: list[SavedCall] | None = None
        # An object that saved calls refer to: on a GPU, autograd runs the backward in another thread.
        self.switch = _Switch()


_state = _ThreadState()


@contextmanager
def _as_current(run: _Record | _Replay) -> Iterator[None]:
    before, _state.run = _state.run, run
    try:
        yield
    finally:
        _state.run = before


class SavedSlot:
    """What autograd stores in place of a saved tensor. own: whether a recompute cannot fill it, so that it keeps its tensor."""

    __slots__ = ("__weakref__", "call", "own", "tensor")

    def __init__(self, call: SavedCall) -> None:
        self.call = call
        self.own = False
        self.tensor: Tensor | None = None


@dataclass
class _Marked:
    """A marked call, which a recompute skips.

    begin, end: the slots that it filled. result: None under `drop`, which needs only `like`, its shape, dtype and device.
    aliases: slot -> (argument, size, stride, offset) of the tensor argument that the slot is a view of. drawn: the state of its
    random generator afterwards.
    """

    begin: int
    end: int = 0
    result: Tensor | None = None
    like: tuple[torch.Size, torch.dtype, torch.device] | None = None
    requires_grad: bool = False
    aliases: dict[int, tuple[int, torch.Size, tuple[int, ...], int]] = field(default_factory=dict)
    drawn: Tensor | None = None


class SavedCall:
    """One call of a unit, as recompute saved it. runs: how often it was recomputed."""

    def __init__(self, body: Body, inputs: Sequence[Any], path: str, random: Streams | None) -> None:
        self.body, self.path, self.random = body, path, random
        self.inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self.requiring_grad = tuple(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        self.state = random.state_dict() if random is not None else {}
        self.switch = _state.switch
        self.slots: list[weakref.ref[SavedSlot]] = []
        self.shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.marked: list[_Marked] = []
        self.runs = 0

    def live(self) -> list[tuple[int, SavedSlot]]:
        """The slots that a backward may still unpack."""
        return [(i, slot) for i, ref in enumerate(self.slots) if (slot := ref()) is not None]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that the call has in memory for its backward."""
        yield from (x for x in self.inputs if isinstance(x, Tensor))
        yield from (marked.result for marked in self.marked if marked.result is not None)
        yield from (slot.tensor for _, slot in self.live() if slot.tensor is not None)

    def free_recomputed(self) -> None:
        """Free what was recomputed. A later backward would recompute it."""
        for _, slot in self.live():
            if not slot.own:
                slot.tensor = None

    def recompute(self) -> None:
        """Run the forward again, to fill every slot whose tensor is missing."""
        self.runs += 1
        run = _Replay(self)
        inputs = [
            x.detach().requires_grad_(required) if isinstance(x, Tensor) else x
            for x, required in zip(self.inputs, self.requiring_grad, strict=True)
        ]
        replayed = self.random.replayed(self.state) if self.random is not None else nullcontext()
        try:
            with torch.enable_grad(), replayed, _as_current(run), saved_tensors_hooks(run.pack, _unpack):
                self.body(*inputs)
        except _AllFilled as all_filled:
            if all_filled.run is run:  # else it belongs to a unit around this one
                return
            raise
        except Exception as failure:
            failure.add_note(f"while {self.path} was recomputed for its backward")
            raise
        raise InternalError(f"{self.path}: its recompute saved fewer values for the backward than its forward")


class _AllFilled(Exception):
    """Every missing tensor is recomputed: the rest of the forward need not run."""

    def __init__(self, run: _Replay) -> None:
        super().__init__()
        self.run = run


class _Record:
    """The first forward: fills `SavedCall` with empty slots and marked calls.

    current, arguments: the marked call that runs, and its tensor arguments.
    """

    def __init__(self, call: SavedCall) -> None:
        self.saved = call
        self.current: _Marked | None = None
        self.arguments: list[Tensor] = []

    def pack(self, tensor: Tensor) -> SavedSlot:
        saved, slot = self.saved, SavedSlot(self.saved)
        if self.current is not None:
            alias = _alias(tensor, self.arguments)
            if alias is None:  # computed inside of a call that is not run again
                slot.own, slot.tensor = True, tensor.detach()
            else:
                self.current.aliases[len(saved.slots)] = alias
        saved.slots.append(weakref.ref(slot))
        saved.shapes.append((tensor.shape, tensor.dtype))
        return slot

    def call(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], stored: bool) -> Tensor:
        if self.current is not None:  # inside of a marked call
            return function(*args, **kwargs)
        marked = self.current = _Marked(len(self.saved.slots))
        self.arguments = _tensors(args, kwargs)
        try:
            result = function(*args, **kwargs)
        finally:
            self.current, self.arguments = None, []
        marked.end = len(self.saved.slots)
        marked.like = result.shape, result.dtype, result.device
        marked.requires_grad = result.requires_grad
        marked.result = result.detach() if stored else None
        stream = kwargs.get("random")
        marked.drawn = None if stream is None else stream.generator.get_state()
        self.saved.marked.append(marked)
        return result


class _Replay:
    """A recompute: autograd saves the same tensors in the same order, which fill the slots.

    at: the next slot. last: the last one that is missing. calls: how many marked calls have passed.
    """

    def __init__(self, call: SavedCall) -> None:
        self.saved = call
        self.missing = {i: slot for i, slot in call.live() if slot.tensor is None}
        self.last = max(self.missing)
        self.at = self.calls = 0

    def pack(self, tensor: Tensor) -> None:
        if self.at in self.missing:
            if self.saved.shapes[self.at] != (tensor.shape, tensor.dtype):
                first = "{1} of {0}".format(*self.saved.shapes[self.at])
                now = f"{tensor.dtype} of {tensor.shape}"
                raise InternalError(f"{self.saved.path}: a recomputed value is {now} that was {first} before")
            self.missing[self.at].tensor = tensor.detach()
        self._advance(self.at + 1)

    def call(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], stored: bool) -> Tensor:
        marked = self.saved.marked[self.calls]
        self.calls += 1
        arguments = _tensors(args, kwargs)
        for slot, (argument, size, stride, offset) in marked.aliases.items():
            if slot in self.missing:
                self.missing[slot].tensor = arguments[argument].detach().as_strided(size, stride, offset)
        self._advance(marked.end)
        if marked.drawn is not None:
            kwargs["random"].generator.set_state(marked.drawn)
        if marked.result is not None:
            return marked.result.detach().requires_grad_(marked.requires_grad)
        # Nobody reads a dropped result. One element, expanded, needs no memory, and NaN would show if it were read.
        assert marked.like is not None
        shape, dtype, device = marked.like
        empty = torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)
        return empty.expand(shape).requires_grad_(marked.requires_grad)

    def _advance(self, to: int) -> None:
        self.at = to
        if to > self.last:
            raise _AllFilled(self)


def _unpack(slot: SavedSlot) -> Tensor:
    if slot.tensor is None:
        slot.call.recompute()
    if slot.tensor is None:
        raise InternalError(f"{slot.call.path}: its recompute lacks a value that its backward needs")
    return slot.tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _alias(tensor: Tensor, arguments: list[Tensor]) -> tuple[int, torch.Size, tuple[int, ...], int] | None:
    """(argument, size, stride, offset) of the argument that a saved tensor is a view of; None where it is of none."""
    for index, argument in enumerate(arguments):
        shared = storage_id(tensor) == storage_id(argument)
        if shared and tensor.dtype == argument.dtype:
            return index, tensor.shape, tensor.stride(), int(tensor.storage_offset())
    return None


class _UnitEntry(torch.autograd.Function):
    """The identity on a unit's inputs. Its backward is the last one of the unit, and frees what was recomputed."""

    @staticmethod
    def forward(ctx: Any, call: weakref.ref[SavedCall], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        call = ctx.call()
        if call is not None and not call.switch.split:
            call.free_recomputed()
        return None, *gradients
