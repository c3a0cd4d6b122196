"""Reading a policy file. Whatever is wrong in it is reported at once, each violation with its line and with what would do.

Also where policy files are: by name among those that come with shardcomp, or by path.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from shardcomp.errors import PolicyError, raise_all
from shardcomp.policy.options import PLACED, option_violations
from shardcomp.policy.patterns import Entry, nearest, parse

WEIGHTS = ("colwise", "rowwise", "vocab", "whole")
"""How a weight splits over tensor-parallel ranks."""
UNITS = ("first", "layer", "last")
"""What a unit is to the model."""
_WORDS = {"weights": WEIGHTS, "units": UNITS}
_KEYS = ("family", "options", "kernels", *_WORDS)
COUNTED = (*PLACED, "attention", "cross_entropy")
"""The kernels that a policy may expect."""
FOLDER = "policies"
AUTO = "auto"
"""The name of the policy that is derived from the model."""


@dataclass(frozen=True)
class ExpectedKernel:
    """An entry of [kernels]: how many of a kernel there should be, at least, in all or in each layer."""

    name: str
    count: int
    per_layer: bool


@dataclass(frozen=True)
class PolicyFile:
    """What a policy file says."""

    family: str
    weights: tuple[Entry, ...]
    units: tuple[Entry, ...]
    options: Mapping[str, Any]
    kernels: tuple[ExpectedKernel, ...]


def read(text: bytes, source: str, options: Mapping[str, Any]) -> PolicyFile:
    """Read the text of a policy file.

    Args:
        text: the file's bytes, UTF-8.
        source: what messages call the file.
        options: the caller's options. They are checked here as well, so that one message has all violations.

    Raises:
        PolicyError: everything that is wrong with the file and with `options`.
    """
    try:
        decoded = text.decode()
        tables = tomllib.loads(decoded)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(f"{source} is not a TOML file: {error}") from error
    reader = _Reader(tables, _lines(decoded))
    file = reader.read()
    raise_all(PolicyError, source, reader.violations + option_violations(options))
    return file


class _Reader:
    """Takes a policy from the tables of a TOML file, and collects what is wrong with them."""

    def __init__(self, tables: Mapping[str, Any], lines: Mapping[tuple[str, str], int]) -> None:
        self.tables, self.lines = tables, lines
        self.violations: list[str] = []

    def read(self) -> PolicyFile:
        self._check_keys()
        family = self._family()
        weights, units = self._entries("weights"), self._entries("units")
        options = self._options()
        return PolicyFile(family, weights, units, options, self._kernels())

    def _place(self, table: str, key: str) -> str:
        """Where a key is written, as a message begins."""
        return f"line {self.lines[table, key]}: " if (table, key) in self.lines else ""

    def _check_keys(self) -> None:
        for key in self.tables:
            if key not in _KEYS:
                close = nearest(key, _KEYS)
                hint = (
                    f"did you mean {close!r}?"
                    if close
                    else "a policy has 'family', [weights], [units], [kernels] and [options]"
                )
                place = self._place(key, "") or self._place("", key)
                self.violations.append(f"{place}unknown key or table {key!r}: {hint}")

    def _family(self) -> str:
        family = self.tables.get("family")
        if not isinstance(family, str) or not family:
            place, shown = self._place("", "family"), json.dumps(family, default=repr)
            wrong = "no family" if family is None else f"{place}family = {shown}"
            self.violations.append(f'{wrong}: write family = "..." with the model_type of the models that the policy is for')
        return str(family)

    def _options(self) -> Mapping[str, Any]:
        options = self.tables.get("options", {})
        if not isinstance(options, dict):
            self.violations.append(f"{self._place('', 'options')}options is a table: write [options] on a line of its own")
            return {}
        self.violations += option_violations(options, lambda name: self._place("options", name))
        return options

    def _kernels(self) -> tuple[ExpectedKernel, ...]:
        table = self.tables.get("kernels", {})
        if not isinstance(table, dict):
            self.violations.append("kernels is not a table: write [kernels] on a line of its own, and the entries below it")
            return ()
        kernels = []
        for name, value in table.items():
            per_layer = re.fullmatch(r"(\d+) per layer", value) if isinstance(value, str) else None
            count = int(per_layer[1]) if per_layer else value
            place = self._place("kernels", name)
            if name not in COUNTED:
                close = nearest(name, COUNTED)
                hint = f"did you mean {close!r}?" if close else f"use {', '.join(COUNTED)}"
                self.violations.append(f"{place}unknown kernel {name!r}: {hint}")
            elif type(count) is not int or count < 0:
                shown = json.dumps(value, default=repr)
                self.violations.append(f'{place}{name} = {shown}: use a number, such as 32, or "1 per layer"')
            else:
                kernels.append(ExpectedKernel(name, count, per_layer is not None))
        return tuple(kernels)

    def _entries(self, name: str) -> tuple[Entry, ...]:
        """The entries of [weights] or [units]."""
        table, words = self.tables.get(name, {}), _WORDS[name]
        if not isinstance(table, dict):
            self.violations.append(f"{name} is not a table: write [{name}] on a line of its own, and the entries below it")
            return ()
        entries = []
        for key, value in table.items():
            line = self.lines.get((name, key), 0)
            place = f"line {line}: " if line else f"[{name}]: "
            if isinstance(value, dict):
                self.violations.append(f"{place}{key} = ...: a pattern stands in quotes, or TOML takes its dots for tables")
                continue
            if value not in words:
                close = nearest(str(value), words)
                hint = f"; the nearest is {close}" if close else ""
                shown = json.dumps(value, default=repr)
                self.violations.append(f'{place}"{key}" = {shown}: use {", ".join(words)}{hint}')
            try:
                entries.append(Entry(parse(key), str(value), line))
            except ValueError as error:
                self.violations.append(f'{place}"{key}": {error}')
        return tuple(entries)


def _lines(text: str) -> dict[tuple[str, str], int]:
    """(table, key) -> the line it is written on; (table, "") is the table's own heading. Python's TOML parser does not say."""
    lines: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if heading := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = heading[1].strip("\"'")
            lines.setdefault((table, ""), number)
        elif key := re.match(r"""\s*(?:"([^"]+)"|'([^']+)'|([\w-]+))""", line):
            lines.setdefault((table, key[1] or key[2] or key[3]), number)
    return lines


# -- where the files are -----------------------------------------------------------------------------------------------------


def find(name: str | Path) -> Path:
    """The file of a policy: a name among the shipped ones, or a path. Raises PolicyError with the names that exist."""
    files = shipped()
    if isinstance(name, str) and name in files:
        return files[name]
    path = Path(name)
    if path.is_file():
        return path
    for file in files.values():
        if path == Path(source_of(file)):  # messages and reports name a shipped file so, whatever the working directory is
            return file
    if path.suffix or len(path.parts) != 1:
        raise PolicyError(f"no policy file {str(path)!r}; shipped with shardcomp: {', '.join(files)}")
    close = nearest(str(name), files)
    hint = f"did you mean {close!r}? " if close else ""
    raise PolicyError(f"no policy {str(name)!r}: {hint}There are {AUTO}, {', '.join(files)}; or give the path of a file")


def shipped() -> dict[str, Path]:
    """Name -> file of the policies that come with shardcomp."""
    folder = Path(str(resources.files("shardcomp.policies")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def families() -> dict[str, Path]:
    """Family -> file of the policies that come with shardcomp."""
    return {tomllib.loads(path.read_text())["family"]: path for path in shipped().values()}


def source_of(path: Path) -> str:
    """What messages call a policy file."""
    return f"{FOLDER}/{path.name}" if path in shipped().values() else str(path)
