"""Parts of packed weights: which rows of a stored tensor, such as `[q; k; v]`, a parameter of its own is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardcomp.errors import InternalError


@dataclass(frozen=True)
class PackedSlice:
    """The rows of the packed tensor `of` that one part is: `count` runs of `run` rows each, the first at `start`, each run
    `stride` rows behind the one before. `dim` is the dimension of both tensors that rows are counted along; `shape` is the
    packed tensor's."""

    of: str
    shape: tuple[int, ...]
    dim: int
    start: int
    run: int
    stride: int
    count: int

    @staticmethod
    def of_rows(of: str, shape: Sequence[int], dim: int, rows: Sequence[int]) -> PackedSlice | None:
        """The part that is made of these rows in this order; None where they are not runs of one length at one stride."""
        breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
        run = breaks[0] if breaks else len(rows)
        if not rows or len(rows) % run:
            return None
        count = len(rows) // run
        stride = rows[run] - rows[0] if count > 1 else run
        found = PackedSlice(of, tuple(shape), dim, rows[0], run, stride, count)
        return found if found.rows() == list(rows) else None

    @property
    def length(self) -> int:
        """The part's own number of rows."""
        return self.run * self.count

    def rows(self) -> list[int]:
        """The rows of the packed tensor, in the part's order."""
        return [self.start + i * self.stride + j for i in range(self.count) for j in range(self.run)]

    def ranges(self, begin: int, end: int) -> Iterator[slice]:
        """Rows `begin` to `end` of the part as slices of the packed tensor, in order."""
        while begin < end:
            index, offset = divmod(begin, self.run)
            length = min(self.run - offset, end - begin)
            first = self.start + index * self.stride + offset
            yield slice(first, first + length)
            begin += length

    def read(self, read: Callable[[str, tuple[slice, ...]], Tensor], index: tuple[slice, ...]) -> Tensor:
        """The piece of the part that `index` says, by reading the packed tensor: `read(name, index)`."""
        at = index[self.dim]
        ranges = list(self.ranges(at.start, at.stop)) or [slice(0, 0)]
        pieces = [read(self.of, (*index[: self.dim], each, *index[self.dim + 1 :])) for each in ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


def group_by_packed(parts: Mapping[str, PackedSlice | None]) -> dict[str, list[str]]:
    """The model's own tensors -> the parameters that hold their rows, both in order: of a packed one its parts, else itself.

    parts: parameter -> which part it is.
    """
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        found.setdefault(part.of if part else name, []).append(name)
    return found


def assemble(name: str, parts: Mapping[str, PackedSlice | None], tensors: Mapping[str, Tensor]) -> Tensor:
    """The packed tensor `name`. parts: parameter -> which part it is, other tensors' not counting; tensors: parameter -> the
    whole part, zeros where there is none. Raises InternalError where the parts are not all of it."""
    mine = {each: part for each, part in parts.items() if part and part.of == name}
    first = next(iter(mine.values()))
    rows = [row for part in mine.values() for row in part.rows()]
    if sorted(rows) != list(range(first.shape[first.dim])):
        raise InternalError(f"{name}: its parts hold {len(rows)} rows, and not each of its {first.shape[first.dim]} once")
    held = {each: tensors[each] for each in mine if each in tensors}
    found = next(iter(held.values())).new_zeros(first.shape)
    for each, tensor in held.items():
        found.index_copy_(first.dim, torch.tensor(mine[each].rows(), device=found.device), tensor)
    return found
