"""Patterns of module paths, as policy files write them: `*` is one segment, `{a,b}` are alternatives, `{a|b}` are names of one
module in different releases; and which claims what.

model.layers.*.self_attn.{q,k,v}_proj
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NAME = r"[\w-]+"
_CHOICE = rf"\{{\s*{_NAME}\s*(?:(?:,\s*{_NAME}\s*)*|(?:\|\s*{_NAME}\s*)*)\}}"
_SEGMENT = re.compile(rf"\*|(?:{_NAME}|{_CHOICE})+")


@dataclass(frozen=True)
class Branch:
    """A pattern with one alternative chosen of every pair of braces."""

    text: str
    chosen: tuple[str, ...]
    regex: re.Pattern[str]


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern and every way to choose among its alternatives."""

    text: str
    branches: tuple[Branch, ...]
    either: tuple[bool, ...]
    """For each pair of braces, whether its alternatives are names of which a release has one."""

    def matches(self, path: str) -> bool:
        """Whether some choice of alternatives gives `path`."""
        return any(branch.regex.fullmatch(path) for branch in self.branches)

    def faults(self, paths: Iterable[str]) -> list[str]:
        """What of the pattern matches none of `paths`: all of it, or single alternatives. Empty where every part is of use."""
        known = list(paths)
        alive = [branch for branch in self.branches if any(branch.regex.fullmatch(path) for path in known)]
        if not alive:
            return [f"matches no module{_hint(self.branches[0].text, known)}"]
        found = []
        for place in (place for place, either in enumerate(self.either) if not either):
            dead = {b.chosen[place]: b for b in self.branches if b.chosen[place] not in {a.chosen[place] for a in alive}}
            found += [f"alternative {word!r} matches no module{_hint(branch.text, known)}" for word, branch in dead.items()]
        return found


def parse(text: str) -> Pattern:
    """Parse one pattern. Raises ValueError that names the faulty segment."""
    for segment in text.split("."):
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(
                f"segment {segment!r} is neither a name, nor '*' alone, nor a name with alternatives {{a,b}} or {{a|b}}"
            )
    pieces = re.split(r"\{([^}]*)\}", text)
    choices = [[word.strip() for word in re.split("[,|]", piece)] for piece in pieces[1::2]]
    branches = []
    for chosen in itertools.product(*choices):
        plain = "".join(itertools.chain(*itertools.zip_longest(pieces[::2], chosen, fillvalue="")))
        regex = r"\.".join(r"[^.]+" if segment == "*" else re.escape(segment) for segment in plain.split("."))
        branches.append(Branch(plain, chosen, re.compile(regex)))
    return Pattern(text, tuple(branches), tuple("|" in piece for piece in pieces[1::2]))


@dataclass(frozen=True)
class Entry:
    """A pattern and the word that a policy file gives it. `line` counts from 1; 0 where the entry comes from no file."""

    pattern: Pattern
    value: str
    line: int = 0

    def __str__(self) -> str:
        return (f"line {self.line}: " if self.line else "") + f'"{self.pattern.text}"'


@dataclass(frozen=True)
class Fault:
    """What is wrong with an entry; `idle` where it fits no path at all."""

    text: str
    idle: bool = False


def claim(entries: Iterable[Entry], paths: Iterable[str]) -> tuple[dict[str, Entry], list[Fault]]:
    """The entry of each path that has one, in the order of the paths; and the faults: idle entries, paths claimed twice."""
    listed, known = list(entries), list(paths)
    faults = []
    for entry in listed:
        unused = entry.pattern.faults(known)
        idle = bool(unused) and not any(entry.pattern.matches(path) for path in known)
        faults += [Fault(f"{entry} {text}", idle) for text in unused]
    claims: dict[str, Entry] = {}
    twice: dict[tuple[Entry, Entry], list[str]] = {}
    for path in known:
        mine = [entry for entry in listed if entry.pattern.matches(path)]
        if mine:
            claims[path] = mine[0]
        for other in mine[1:]:
            twice.setdefault((mine[0], other), []).append(path)
    for (one, other), both in twice.items():
        more = f" and {len(both) - 1} more" if both[1:] else ""
        faults.append(Fault(f"{other} claims {both[0]}{more}, which {one} claims already: a module may be named only once"))
    return claims, faults


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def _hint(pattern: str, paths: list[str]) -> str:
    """The path that the pattern was probably meant for, numbered modules written as the pattern would."""
    general = {".".join("*" if segment.isdigit() else segment for segment in path.split(".")) for path in paths}
    close = nearest(pattern, sorted(general))
    return f"; the nearest is {close!r}" if close else ""
