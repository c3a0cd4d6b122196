"""Packed slices: which rows of a stored tensor, such as `[q; k; v]`, make a parameter of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardcomp.errors import InternalError


@dataclass(frozen=True)
class PackedSlice:
    """The rows of the packed tensor `of` that one parameter is: `count` runs of `run` rows each, the first at `start`, each run
    `stride` rows after the one before. `dim` is the dimension of both tensors that rows are counted along; `shape` is the
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
        """The slice of these rows in this order; None where they are not runs of one length at one stride."""
        # A break is where the next row is not the following one. The first break tells how long a run is.
        breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
        run = breaks[0] if breaks else len(rows)
        if not rows or len(rows) % run:
            return None
        count = len(rows) // run
        stride = rows[run] - rows[0] if count > 1 else run
        # Later runs may have another length or stride: then these six numbers do not give the rows back.
        packed_slice = PackedSlice(of, tuple(shape), dim, rows[0], run, stride, count)
        return packed_slice if packed_slice.rows() == list(rows) else None

    @property
    def length(self) -> int:
        """The slice's own number of rows."""
        return self.run * self.count

    def rows(self) -> list[int]:
        """The rows of the packed tensor, in the slice's order."""
        return [self.start + i * self.stride + j for i in range(self.count) for j in range(self.run)]

    def ranges(self, begin: int, end: int) -> Iterator[slice]:
        """Rows `begin` to `end` of the slice as ranges of the packed tensor, in order."""
        while begin < end:
            # A shard may begin and end inside a run.
            index, offset = divmod(begin, self.run)
            length = min(self.run - offset, end - begin)
            first = self.start + index * self.stride + offset
            yield slice(first, first + length)
            begin += length

    def read(self, read: Callable[[str, tuple[slice, ...]], Tensor], index: tuple[slice, ...]) -> Tensor:
        """What `index` selects of the slice, by reading the packed tensor: `read(name, index)`."""
        at = index[self.dim]
        # An empty shard is read as well, for its dtype and its other dimensions.
        ranges = list(self.ranges(at.start, at.stop)) or [slice(0, 0)]
        blocks = [read(self.of, (*index[: self.dim], rows, *index[self.dim + 1 :])) for rows in ranges]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, self.dim)


def group_by_packed(slices: Mapping[str, PackedSlice | None]) -> dict[str, list[str]]:
    """The model's own tensors -> the parameters that hold their rows, both in order: of a packed one its slices, else itself.

    slices: parameter -> the packed slice that it is, or None.
    """
    names_of: dict[str, list[str]] = {}
    for name, packed_slice in slices.items():
        names_of.setdefault(packed_slice.of if packed_slice else name, []).append(name)
    return names_of


def assemble(name: str, slices: Mapping[str, PackedSlice | None], tensors: Mapping[str, Tensor]) -> Tensor:
    """The packed tensor `name`. slices: parameter -> the packed slice that it is; entries of other tensors are ignored.
    tensors: parameter -> the full slice, zeros where there is none. Raises InternalError where the slices are not all of it."""
    slices_here = {param_name: one for param_name, one in slices.items() if one and one.of == name}
    first = next(iter(slices_here.values()))
    rows = [row for packed_slice in slices_here.values() for row in packed_slice.rows()]
    if sorted(rows) != list(range(first.shape[first.dim])):
        raise InternalError(f"{name}: its parts hold {len(rows)} rows, and not each of its {first.shape[first.dim]} once")
    tensors_here = {param_name: tensors[param_name] for param_name in slices_here if param_name in tensors}
    packed = next(iter(tensors_here.values())).new_zeros(first.shape)
    for param_name, tensor in tensors_here.items():
        packed.index_copy_(first.dim, torch.tensor(slices_here[param_name].rows(), device=packed.device), tensor)
    return packed
