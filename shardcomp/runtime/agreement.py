"""What ranks exchange before a call of the model: one small message along each axis.

The ranks of one pp and tp group must compute with the same batch, and all ranks must make the same calls. Otherwise they would
train on a mixture, or wait for each other for ever. So every call starts with an exchange of a few numbers: digests of the call
and its batch, how many labels count, how many micro-batches there are, and whether a token or label is out of bounds.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardcomp.errors import BatchError, PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.runtime.blueprint import IndexBound
from shardcomp.runtime.digest import MULTIPLIER, digest

CALL, BATCH, TRAINED, DIFFERS, OUTSIDE, CHANGED, MICRO_BATCHES, TOKENS = range(8)
"""The int64 numbers of the message.

CALL, BATCH, TRAINED: digests of the call with its shapes, of the numbers in the batch, and of which parameters have
requires_grad. DIFFERS: whether one of these differs along an axis that was compared already. OUTSIDE: whether a token or label
is out of bounds. CHANGED: whether a parameter is trained that the code was not lowered for. MICRO_BATCHES: how many there are.
TOKENS: how many labels count.
"""
WIDTH = 8
_LARGEST = slice(DIFFERS, MICRO_BATCHES + 1)
"""The numbers that combine to the largest. Slices: an index in a list makes an accelerator's host wait for it."""
_COMPARED = {"tp": slice(CALL, TRAINED + 1), "pp": slice(CALL, BATCH + 1), "dp": slice(TRAINED, TRAINED + 1)}
"""The digests that must be the same along an axis. Stages have other parameters, data-parallel ranks other batches."""
_SAME = (
    "A batch is this data-parallel rank's samples, the same on every rank of one pp and tp group: choose samples by "
    'sharded.mesh["dp"].get_local_rank(), not by the rank in the world'
)
FIRST_CALLS = 3
"""On an accelerator, so many calls of a kind wait for the answer. Answers of later calls are read when they have arrived."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after an exchange.

    tokens: the number of labels of the global batch that count, int64 []. micro_batches: the largest number on a rank. changed:
    whether a rank trains a parameter that the code was not lowered for. bad: [], where the answer is still on the device; not
    zero if the step must not change any weight.
    """

    tokens: Tensor
    micro_batches: int
    changed: bool
    bad: Tensor | None = None


class Agreement:
    """The exchange before each call.

    compare: whether digests are compared. Without, pp and dp exchange only what a step needs. at_once: whether every answer is
    read before the call, as on a CPU. Otherwise only the first calls of a kind wait for the device. host: the axes whose hosts,
    beside an accelerator, exchange what they must know before a step: MICRO_BATCHES and CHANGED.
    """

    def __init__(
        self,
        axes: Mapping[str, Axis],
        device: torch.device,
        compare: bool = True,
        at_once: bool = True,
        host: Mapping[str, Axis] | None = None,
    ) -> None:
        self.axes = {name: replace(axis, unit="what ranks compare before a call") for name, axis in axes.items()}
        self.device, self.compare, self.at_once, self.host = device, compare, at_once, dict(host or {})
        self._calls: dict[int, int] = {}
        self._answers: deque[_Answer] = deque()

    def exchange(
        self,
        call: str,
        batch: Mapping[str, Tensor],
        bounds: Mapping[str, IndexBound],
        axes: Sequence[str],
        tokens: Tensor,
        micro_batches: int = 1,
        trained: int = 0,
        changed: bool = False,
    ) -> Agreed:
        """Compare a call with the calls of the other ranks along `axes`.

        call: in words. bounds: of inputs of the batch. tokens: this rank's number of labels that count, int64 []. trained: the
        digest of what is trained. changed: see CHANGED.

        Raises PlanError on all ranks along `axes` where ranks of one pp and tp group make different calls, and BatchError for a
        number out of bounds.
        """
        self.poll()
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        described = " of ".join((call, *filter(None, [", ".join(f"{n} {list(shape)}" for n, shape in sorted(shapes.items()))])))
        kind = zlib.crc32(described.encode())
        outside = _outside(batch, bounds)
        own = torch.zeros(WIDTH, dtype=torch.int64)
        own[CALL], own[TRAINED], own[CHANGED], own[MICRO_BATCHES] = kind, trained, changed, micro_batches
        numbers = own.to(self.device, non_blocking=True)
        numbers[TOKENS] = tokens
        if outside is not None:
            numbers[OUTSIDE] = outside[:, 0].sum() > 0
        compared = batch and self.compare and any(self.axes[name].size > 1 for name in axes if name != "dp")
        if compared:
            numbers[BATCH] = _digest_of(batch)
        differing = ""
        # Each axis combines the messages of its ranks into one, which the next axis exchanges: dp, the last, sees them all.
        for axis in (self.axes[name] for name in axes):
            if axis.size > 1 and (self.compare or axis.name != "tp"):
                every = axis.all_gather(numbers.unsqueeze(0), 0)
                if self.at_once and not differing:
                    differing = _differing(axis, every, described) if self.compare else ""
                numbers = _combined(axis.name, every, self.compare)
        answer = _Answer(described, numbers, outside, tuple((name, shapes[name]) for name in bounds), differing)
        if self.at_once:
            answer.check()
            return Agreed(numbers[TOKENS].clone(), int(numbers[MICRO_BATCHES]), bool(numbers[CHANGED]))
        micro_batches, changed = self._of_hosts(axes, micro_batches, changed)
        self._calls[kind] = self._calls.get(kind, 0) + 1
        if self._calls[kind] <= FIRST_CALLS:
            answer.check()
        else:
            self._answers.append(answer)
            answer.fetch()
        return Agreed(numbers[TOKENS].clone(), micro_batches, changed, numbers[DIFFERS] + numbers[OUTSIDE])

    def poll(self, wait: bool = False) -> None:
        """Raise what the answers of earlier calls say: of those that have arrived, or where `wait` of all."""
        while self._answers and (wait or self._answers[0].is_there()):
            self._answers.popleft().check()

    def _of_hosts(self, axes: Sequence[str], micro_batches: int, changed: bool) -> tuple[int, bool]:
        for axis in (self.host[name] for name in axes if name in self.host):
            every = axis.all_gather(torch.tensor([[micro_batches, changed]], dtype=torch.int64), 0)
            micro_batches, changed = int(every[:, 0].max()), bool(every[:, 1].max())
        return micro_batches, changed


@dataclass
class _Answer:
    """The answer of an exchange, on the device. bounded: (input, shape) of each row of `outside`. differing: what differs, in
    words, where that is known."""

    described: str
    numbers: Tensor
    outside: Tensor | None
    bounded: tuple[tuple[str, tuple[int, ...]], ...]
    differing: str

    _copied: torch.Event | None = None

    def fetch(self) -> None:
        """Start to copy it to the host."""
        device = self.numbers.device
        if device.type != "cpu":
            self.numbers = _to_host(self.numbers)
            self.outside = None if self.outside is None else _to_host(self.outside)
            self._copied = torch.Event(device)
            self._copied.record()

    def is_there(self) -> bool:
        return self._copied is None or bool(self._copied.query())

    def check(self) -> None:
        """Raise what it says."""
        if self._copied is not None:
            self._copied.synchronize()
        if self.numbers[DIFFERS]:
            raise PlanError(
                self.differing or f"{self.described}: ranks differ in the call, its batch or requires_grad. {_SAME}"
            )
        if self.numbers[OUTSIDE]:
            raise BatchError(f"{self._named_outside()} (in {self.described})")

    def _named_outside(self) -> str:
        violations = []
        rows = [] if self.outside is None else self.outside.tolist()
        for (name, shape), (count, place, value, size) in zip(self.bounded, rows, strict=True):
            if count:
                at = f"sample {place // shape[1]}, position {place % shape[1]}"
                more = f" and {count - 1} more" if count > 1 else ""
                violations.append(f"{name} of {at} is {value}{more}; the model takes 0 to {size - 1}")
        if not violations:
            return "another data-parallel rank has a number that the model cannot take"
        hint = "labels of tokens that do not count are -100, and new tokens need model.resize_token_embeddings before sharding"
        return f"{'; '.join(violations)}: {hint}"


def _digest_of(batch: Mapping[str, Tensor]) -> Tensor:
    """A digest of all tensors of a batch, in the order of their names: int64 []."""
    first, *others = (digest(tensor) for _, tensor in sorted(batch.items()))
    for other in others:
        first = first * MULTIPLIER + other
    return first


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that the device's stream fills later. The host would wait if its memory were not pinned."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _combined(axis: str, every: Tensor, compare: bool) -> Tensor:
    """The numbers of all ranks of an axis, [ranks, WIDTH], as those of one: [WIDTH]."""
    combined = every[0].clone()
    combined[_LARGEST] = every[:, _LARGEST].amax(0)
    if compare:
        columns = _COMPARED[axis]
        combined[DIFFERS] += (every[:, columns] != every[:1, columns]).any()
    if axis == "dp":
        combined[TOKENS] = every[:, TOKENS].sum()
    return combined


def _differing(axis: Axis, every: Tensor, described: str) -> str:
    """What the ranks of an axis differ in, and what would help; empty where they agree."""
    words = {CALL: "make another call, or one of other shapes", BATCH: "have other numbers in it"}
    for column in range(WIDTH)[_COMPARED[axis.name]]:
        own = int(every[axis.rank, column])
        others = [str(rank) for rank, number in enumerate(every[:, column].tolist()) if number != own]
        if others:
            what = words.get(column, "have other parameters with requires_grad")
            hint = _SAME if column in words else "Set it alike on every rank"
            return (
                f"{axis.name} rank {axis.rank} makes the call {described}; {axis.name} rank {', '.join(others)} {what}. {hint}"
            )
    return ""


def _outside(batch: Mapping[str, Tensor], bounds: Mapping[str, IndexBound]) -> Tensor | None:
    """[inputs, 4] int64, a row for each bounded input, in order; None where there are none.

    A row: how many numbers are out of bounds, the index of the first in the flat tensor, its value, and the size that it must
    stay below.
    """
    rows = []
    for name, bound in bounds.items():
        flat = batch[name].detach().flatten()
        mask = (flat < 0) | (flat >= bound.size)
        if bound.ignored is not None:
            mask &= flat != bound.ignored
        if not flat.numel() or flat.device.type == "cpu" and not mask.any():
            rows.append(torch.zeros(4, dtype=torch.int64, device=flat.device))
            continue
        place = mask.to(torch.uint8).argmax()
        first = flat.index_select(0, place.reshape(1)).squeeze(0)
        rows.append(torch.stack([mask.sum(), place, first.to(torch.int64), torch.full_like(place, bound.size)]))
    return torch.stack(rows) if rows else None
