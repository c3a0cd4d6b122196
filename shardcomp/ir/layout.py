"""How a value lies over the mesh: on each axis it is whole, split along a dimension, or partial (to be summed).

A value may also be split into fewer pieces than there are ranks, each held by a few neighbouring ranks, as key-value heads are
where there are more ranks than heads. The gradient that each of these ranks has is then one summand of the piece's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

Size = Any
"""An `int` or a sympy expression in the batch size b and the sequence length s."""


@dataclass(frozen=True)
class Placement:
    """The layout of a value on one axis. `dim` is set for a split, `partial` for a result that is still to be summed.

    copies: how many neighbouring ranks hold each piece, and a summand of its gradient. With as many copies as there are ranks
    there is but one piece: the value is not split, and each rank has a summand of its gradient.
    """

    dim: int | None = None
    partial: bool = False
    copies: int = 1

    @property
    def is_split(self) -> bool:
        return self.dim is not None

    @property
    def is_whole(self) -> bool:
        return self.dim is None and not self.partial and self.copies == 1

    @property
    def is_copied(self) -> bool:
        """In one piece, of which each rank has a summand of the gradient."""
        return self.dim is None and self.copies > 1

    def __str__(self) -> str:
        if self.dim is None:
            return "partial" if self.partial else "whole" if self.copies == 1 else "copied"
        return f"split({self.dim})" if self.copies == 1 else f"split({self.dim}, {self.copies} copies)"


WHOLE = Placement()
PARTIAL = Placement(partial=True)


def split(dim: int, copies: int = 1) -> Placement:
    return Placement(dim=dim, copies=copies)


def copied(ranks: int) -> Placement:
    return Placement(copies=ranks)


@dataclass(frozen=True)
class Layout:
    """The placement on every axis; axes that are not named are whole."""

    placements: tuple[tuple[str, Placement], ...] = ()

    def on(self, axis: str) -> Placement:
        return dict(self.placements).get(axis, WHOLE)

    def put(self, axis: str, placement: Placement) -> Layout:
        kept = [(a, p) for a, p in self.placements if a != axis]
        if not placement.is_whole:
            kept.append((axis, placement))
        return Layout(tuple(sorted(kept, key=lambda entry: entry[0])))

    @property
    def is_whole(self) -> bool:
        return not self.placements

    def partial_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, placement in self.placements if placement.partial)

    def split_axes(self, dim: int) -> tuple[str, ...]:
        return tuple(axis for axis, placement in self.placements if placement.dim == dim)

    def local_shape(
        self, shape: tuple[Size, ...], sizes: dict[str, int], rank: dict[str, int] | None = None
    ) -> tuple[Size, ...]:
        """The shape that one rank holds of a value of global `shape`, on axes of the given `sizes`.

        A dimension that does not divide lies as `torch.chunk` leaves it: `rank` (coordinates by axis) then says whose share
        is meant, by default that of the first rank, which is never smaller than another's.
        """
        local = list(shape)
        for axis, placement in self.placements:
            if placement.dim is not None:
                pieces, index = sizes[axis] // placement.copies, (rank or {}).get(axis, 0) // placement.copies
                local[placement.dim] = chunk(local[placement.dim], pieces, index)
        return tuple(local)

    def __str__(self) -> str:
        return ", ".join(f"{axis}: {placement}" for axis, placement in self.placements) or "whole"


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal whatever b and s are."""
    return a == b or (isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr)) and sympy.expand(a - b) == 0


def divides(size: Size, parts: int) -> bool:
    """Whether a size, which may be symbolic, splits evenly. A symbolic length is checked when the batch is known."""
    if isinstance(size, sympy.Expr) and not size.is_Integer:
        return not (size / parts).is_number
    return int(size) % parts == 0


def chunk(size: Size, parts: int, index: int) -> Size:
    """The length of the `index`-th of `parts` pieces, as `torch.chunk` cuts them. Symbolic sizes are taken to divide."""
    if parts == 1:
        return size
    if isinstance(size, sympy.Expr) and not size.is_Integer:
        return size / parts
    step = -(-int(size) // parts)
    return max(0, min(int(size), (index + 1) * step) - index * step)
