"""How a value lies over the mesh: on each axis it is whole, split along a dimension, or partial (to be summed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

Size = Any
"""An `int` or a sympy expression in the batch size b and the sequence length s."""


@dataclass(frozen=True)
class Placement:
    """The layout of a value on one axis. `dim` is set for a split, `partial` for a result that is still to be summed."""

    dim: int | None = None
    partial: bool = False

    @property
    def is_split(self) -> bool:
        return self.dim is not None

    @property
    def is_whole(self) -> bool:
        return self.dim is None and not self.partial

    def __str__(self) -> str:
        return "partial" if self.partial else "whole" if self.dim is None else f"split({self.dim})"


WHOLE = Placement()
PARTIAL = Placement(partial=True)


def split(dim: int) -> Placement:
    return Placement(dim=dim)


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
                local[placement.dim] = chunk(local[placement.dim], sizes[axis], (rank or {}).get(axis, 0))
        return tuple(local)

    def __str__(self) -> str:
        return ", ".join(f"{axis}: {placement}" for axis, placement in self.placements) or "whole"


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
