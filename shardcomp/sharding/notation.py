"""The notation of sharding rules: one line says how an operator may be split. Pure Python, without torch.

    ... i, o i, +o -> ... o

One entry per tensor operand, then the results. A name is a *factor*: wherever it appears, that dimension is split in the same
way. `...` is any further dimensions, split alike in every operand that has them. A factor that no result has is contracted:
splitting it makes the results partial. `!` after a factor: it must not be split. `+` before an operand: it is added to the
result, so it cannot meet a partial one. Operands given by keyword are written `name: dims`. After `|`: `linear 0` (linear in
only operand 0) or `linear all` (in all jointly), through which a partial operand may pass as it is.

    >>> parse("r i, i o -> r o | linear 0 1").results
    (Entry(dims=('r', 'o'), keyword=None, additive=False),)
    >>> factors_of(("...", "o"), rank=3, leading=2)
    ('_0', '_1', 'o')
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Dims = tuple[str | None, ...]
"""The factor of each dimension; None for one that must not be split or is broadcast."""


@dataclass(frozen=True)
class Entry:
    """One operand or result of a parsed rule."""

    dims: tuple[str, ...]
    keyword: str | None = None
    additive: bool = False


@dataclass(frozen=True)
class Notation:
    """A parsed line of the notation."""

    operands: tuple[Entry, ...]
    results: tuple[Entry, ...]
    linear: frozenset[int] = frozenset()
    jointly_linear: bool = False


def parse(line: str) -> Notation:
    """Parse one line of the notation. Raises ValueError, which names the part that is wrong."""
    text, _, options = line.partition("|")
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"{line!r}: no '->' between operands and results")
    operands = tuple(_entry(part, line) for part in left.split(","))
    results = tuple(_entry(part, line) for part in right.split(","))
    words = options.split()
    if words and words[0] != "linear":
        raise ValueError(f"{line!r}: {words[0]!r} is not an option; use 'linear all' or 'linear' with operand numbers")
    numbers = [word for word in words[1:] if word != "all"]
    return Notation(operands, results, frozenset(int(n) for n in numbers), "all" in words)


def _entry(text: str, line: str) -> Entry:
    keyword, colon, dims = text.partition(":")
    body = (dims if colon else keyword).strip()
    additive = body.startswith("+")
    names = tuple(body.lstrip("+").split())
    for name in names:
        if name != "..." and not re.fullmatch(r"[a-z]\w*!?", name):
            raise ValueError(f"{line!r}: {name!r} is not a factor")
    return Entry(names, keyword.strip() if colon else None, additive)


def factors_of(dims: tuple[str, ...], rank: int, leading: int) -> Dims | None:
    """The factors of a tensor of `rank` dimensions, `...` written out as numbered factors, the last of them the same in every
    operand. leading: the most dimensions that `...` is in any operand. None where the rank does not fit."""
    if "..." not in dims:
        return tuple(None if d.endswith("!") else d for d in dims) if len(dims) == rank else None
    at = dims.index("...")
    extra = rank - len(dims) + 1
    if extra < 0:
        return None
    # Numbered from the right, so that [s, h] beside [b, s, h] has the factor of s, and not of b.
    middle = tuple(f"_{leading - extra + i}" for i in range(extra))
    return tuple(None if d.endswith("!") else d for d in (*dims[:at], *middle, *dims[at + 1 :]))
