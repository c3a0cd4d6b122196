"""The layout of a value on the mesh: on each axis it is replicated, sharded along a dimension, or partial (still to be summed).

A value may also have fewer shards than there are ranks, each of them on a few neighbouring ranks. Key-value heads have where
there are more ranks than heads. The gradient that each of these ranks has is then one summand of the shard's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

Size = Any
"""An `int` or a sympy expression in the batch size b and the sequence length s."""


@dataclass(frozen=True)
class Placement:
    """The state of a value on one mesh axis.

    dim: the dimension that a sharded value is split along. partial: each rank has a summand of the value. copies: how many
    neighbouring ranks have the same shard, and a summand of its gradient each. With as many copies as ranks there is one shard:
    the value is not split, and each rank has a summand of its gradient.
    """

    dim: int | None = None
    partial: bool = False
    copies: int = 1

    @property
    def is_sharded(self) -> bool:
        """Split along a dimension, maybe with several copies of each shard."""
        return self.dim is not None

    @property
    def is_replicated(self) -> bool:
        """The same on every rank, and so is its gradient."""
        return self.dim is None and not self.partial and self.copies == 1

    @property
    def is_copied(self) -> bool:
        """The same on every rank, with a summand of the gradient on each."""
        return self.dim is None and self.copies > 1

    def __str__(self) -> str:
        if self.dim is None:
            return "partial" if self.partial else "replicated" if self.copies == 1 else "copied"
        return f"sharded({self.dim})" if self.copies == 1 else f"sharded({self.dim}, {self.copies} copies)"


REPLICATED = Placement()
PARTIAL = Placement(partial=True)


def split(dim: int, copies: int = 1) -> Placement:
    return Placement(dim=dim, copies=copies)


def copied(ranks: int) -> Placement:
    return Placement(copies=ranks)


@dataclass(frozen=True)
class Layout:
    """The placement of a value on every axis of the mesh; on an axis that is not named it is replicated."""

    placements: tuple[tuple[str, Placement], ...] = ()

    def on(self, axis: str) -> Placement:
        return dict(self.placements).get(axis, REPLICATED)

    def put(self, axis: str, placement: Placement) -> Layout:
        # Replicated axes are left out and the others sorted, so that equal layouts compare equal.
        placements = [(a, p) for a, p in self.placements if a != axis]
        if not placement.is_replicated:
            placements.append((axis, placement))
        return Layout(tuple(sorted(placements, key=lambda entry: entry[0])))

    @property
    def is_replicated(self) -> bool:
        """The same on every rank, and so is its gradient."""
        return not self.placements

    def partial_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, placement in self.placements if placement.partial)

    def split_axes(self, dim: int) -> tuple[str, ...]:
        return tuple(axis for axis, placement in self.placements if placement.dim == dim)

    def local_shape(
        self, shape: tuple[Size, ...], sizes: dict[str, int], rank: dict[str, int] | None = None
    ) -> tuple[Size, ...]:
        """The shape of one rank's shard of a value of global `shape`, on axes of these `sizes`.

        A dimension that does not divide is split as `torch.chunk` does: `rank` (coordinates by axis) then says whose shard is
        meant. By default it is the first rank's, which is never smaller than another's.
        """
        local = list(shape)
        for axis, placement in self.placements:
            if placement.dim is not None:
                shards, index = sizes[axis] // placement.copies, (rank or {}).get(axis, 0) // placement.copies
                local[placement.dim] = chunk(local[placement.dim], shards, index)
        return tuple(local)

    def __str__(self) -> str:
        return ", ".join(f"{axis}: {placement}" for axis, placement in self.placements) or "replicated"


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever b and s are."""
    # Expanded, because (b + 1) · s and b · s + s are different trees.
    return a == b or (isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr)) and sympy.expand(a - b) == 0


def divides(size: Size, parts: int) -> bool:
    """Whether a size, which may be symbolic, splits evenly. A symbolic length is checked when the batch is known."""
    if isinstance(size, sympy.Expr) and not size.is_Integer:
        # s / 2 stays a symbol and is taken to divide. A number here is a fraction.
        return not (size / parts).is_number
    return int(size) % parts == 0


def chunk(size: Size, parts: int, index: int) -> Size:
    """The length of the `index`-th of `parts` chunks, as `torch.chunk` makes them. Symbolic sizes are taken to divide."""
    if parts == 1:
        return size
    if isinstance(size, sympy.Expr) and not size.is_Integer:
        return size / parts
    # Every chunk has ceil(size / parts) rows, except that the last ones may have fewer or none.
    step = -(-int(size) // parts)
    return max(0, min(int(size), (index + 1) * step) - index * step)
