"""Parts of packed weights: which rows of a stored tensor, such as `[q; k; v]`, a parameter of its own is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
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
    def of_rows(of: str, shape: Sequence[int], dim: int, rows: Sequence[int]) -> Part | None:
        """The part that is made of these rows in this order; None where they are not runs of one length at one stride."""
        breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
        run = breaks[0] if breaks else len(rows)
        if not rows or len(rows) % run:
            return None
        count = len(rows) // run
        stride = rows[run] - rows[0] if count > 1 else run
        found = Part(of, tuple(shape), dim, rows[0], run, stride, count)
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
        pieces = [read(self.of, (*index[: self.dim], each, *index[self.dim + 1 :])) for each in self.ranges(at.start, at.stop)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


def join(packed: str, parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor `packed` made of its parts. parts: name -> part, all of `packed`; tensors: name -> the whole part."""
    names = [name for name, part in parts.items() if part.of == packed]
    first = parts[names[0]]
    found = tensors[names[0]].new_empty(first.shape)
    for name in names:
        rows = torch.tensor(parts[name].rows(), device=found.device)
        found.index_copy_(first.dim, rows, tensors[name])
    return found
