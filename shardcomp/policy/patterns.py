"""Patterns of module paths, as policy files write them, and which pattern claims which module.

    model.layers.*.self_attn.{q,k,v}_proj

`*` is one segment of the path. `{a,b}` are alternatives, each of which must match something. `{a|b}` are the names that one
module has in different releases: one of them must match.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NAME = r"[\w-]+"
_BRACES = rf"\{{\s*{_NAME}\s*(?:(?:,\s*{_NAME}\s*)*|(?:\|\s*{_NAME}\s*)*)\}}"
_SEGMENT = re.compile(rf"\*|(?:{_NAME}|{_BRACES})+")


@dataclass(frozen=True)
class Branch:
    """A pattern with one alternative chosen of every pair of braces."""

    text: str
    chosen: tuple[str, ...]
    regex: re.Pattern[str]


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern, with one branch for every way to choose among its alternatives."""

    text: str
    branches: tuple[Branch, ...]
    either: tuple[bool, ...]
    """For each pair of braces, whether it is `{a|b}`: names of one module, of which a release has one."""

    def matches(self, path: str) -> bool:
        """Whether some choice of alternatives gives `path`."""
        return any(branch.regex.fullmatch(path) for branch in self.branches)

    def violations(self, paths: Iterable[str]) -> list[str]:
        """What matches none of `paths`: the whole pattern, or single alternatives of it. Empty where each one matches."""
        paths = list(paths)
        used = [branch for branch in self.branches if any(branch.regex.fullmatch(path) for path in paths)]
        if not used:
            return [f"matches no module{_hint(self.branches[0].text, paths)}"]
        violations = []
        for position in (position for position, either in enumerate(self.either) if not either):
            # An alternative is unused if no branch that has it is used; a single branch of it may be.
            words = {branch.chosen[position] for branch in used}
            unused = {b.chosen[position]: b for b in self.branches if b.chosen[position] not in words}
            violations += [f"alternative {word!r} matches no module{_hint(b.text, paths)}" for word, b in unused.items()]
        return violations


def parse(text: str) -> Pattern:
    """Parse one pattern. Raises ValueError that names the segment which is not one."""
    for segment in text.split("."):
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(
                f"segment {segment!r} is neither a name, nor '*' alone, nor a name with alternatives {{a,b}} or {{a|b}}"
            )
    # Split at the braces: the even entries are plain text, the odd ones are what is in braces.
    texts = re.split(r"\{([^}]*)\}", text)
    plain, braces = texts[::2], texts[1::2]
    alternatives = [[word.strip() for word in re.split("[,|]", inner)] for inner in braces]
    branches = []
    for chosen in itertools.product(*alternatives):
        path = "".join(itertools.chain(*itertools.zip_longest(plain, chosen, fillvalue="")))
        regex = r"\.".join(r"[^.]+" if segment == "*" else re.escape(segment) for segment in path.split("."))
        branches.append(Branch(path, chosen, re.compile(regex)))
    return Pattern(text, tuple(branches), tuple("|" in inner for inner in braces))


@dataclass(frozen=True)
class Entry:
    """A pattern and the word that a policy file gives it. `line` counts from 1, and is 0 for an entry that is in no file."""

    pattern: Pattern
    value: str
    line: int = 0

    def __str__(self) -> str:
        return (f"line {self.line}: " if self.line else "") + f'"{self.pattern.text}"'


@dataclass(frozen=True)
class Violation:
    """What is wrong with an entry. `unmatched`: its pattern matches no path at all."""

    text: str
    unmatched: bool = False


def claim(entries: Iterable[Entry], paths: Iterable[str]) -> tuple[dict[str, Entry], list[Violation]]:
    """Find the entry of every path.

    Returns:
        The entry of each path that has one, in the order of the paths; and the violations: patterns and alternatives that match
        nothing, and paths that two entries claim.
    """
    entries, paths = list(entries), list(paths)
    violations = []
    for entry in entries:
        texts = entry.pattern.violations(paths)
        unmatched = bool(texts) and not any(entry.pattern.matches(path) for path in paths)
        violations += [Violation(f"{entry} {text}", unmatched) for text in texts]
    claims: dict[str, Entry] = {}
    claimed_twice: dict[tuple[Entry, Entry], list[str]] = {}
    for path in paths:
        claimants = [entry for entry in entries if entry.pattern.matches(path)]
        if claimants:
            claims[path] = claimants[0]
        for other in claimants[1:]:
            claimed_twice.setdefault((claimants[0], other), []).append(path)
    for (first, other), shared in claimed_twice.items():
        more = f" and {len(shared) - 1} more" if shared[1:] else ""
        text = f"{other} claims {shared[0]}{more}, which {first} claims already: a module may be named only once"
        violations.append(Violation(text))
    return claims, violations


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a misspelling of."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def _hint(pattern: str, paths: list[str]) -> str:
    """The path that the pattern was probably meant for, with `*` for the numbers of modules."""
    general = {".".join("*" if segment.isdigit() else segment for segment in path.split(".")) for path in paths}
    close = nearest(pattern, sorted(general))
    return f"; the nearest is {close!r}" if close else ""
