"""Policies: how each weight of a model splits, what its units are, and the options. Read from TOML, checked against a model."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from shardcomp.errors import PolicyError, raise_all
from shardcomp.ir.mesh import Mesh
from shardcomp.policy.options import PLACED, Options, add_option_flags, flags, options_from, violations
from shardcomp.policy.patterns import Entry, Fault, claim, nearest, parse

__all__ = ["Entry", "Options", "Policy", "add_option_flags", "flags", "options_from"]

WEIGHTS = ("colwise", "rowwise", "vocab", "whole")
"""How a weight splits over tensor-parallel ranks."""
UNITS = ("first", "layer", "last")
"""What a unit is to the model."""
_TABLES = {"weights": WEIGHTS, "units": UNITS}
COUNTED = (*PLACED, "attention", "cross_entropy")
"""The kernels that a policy may expect."""
_SHIPPED = "policies"
AUTO = "auto"
"""The name of the policy that is derived from the model."""


@dataclass(frozen=True)
class Policy:
    """What the user asks for. `asked` holds the options that the file and the caller gave; `source` names the file in messages.

    Raises PolicyError that lists every option that is unknown or not legal.
    """

    family: str
    weights: tuple[Entry, ...] = ()
    units: tuple[Entry, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = "policy"
    automatic: bool = False
    """The entries are still to be found from the model, when it is lowered."""
    kernels: tuple[tuple[str, int, bool], ...] = ()
    """The kernels that are expected: name, how many at least, and whether that is for each layer."""

    def __post_init__(self) -> None:
        raise_all(PolicyError, self.source, violations(self.asked) or self._unsplit())

    def _unsplit(self) -> list[str]:
        tensor = self.options.tensor
        if self.automatic or tensor == 1 or any(entry.value != "whole" for entry in self.weights):
            return []
        return [f"tensor = {tensor}, but no entry of [weights] splits anything: add entries, or use tensor = 1"]

    @cached_property
    def options(self) -> Options:
        """The options, those that were not asked for at their defaults."""
        return Options(**self.asked)

    @staticmethod
    def load(name: str | Path, **options: Any) -> Policy:
        """Read a policy: a name among the shipped files, or a path. Keyword arguments win over the file's [options]. The policy
        "auto" needs no file: the model that is lowered says how it splits.

        Raises PolicyError that lists every fault of the file and of the options, or the names that exist.
        """
        if name == AUTO:
            return Policy(AUTO, asked=options, source=AUTO, automatic=True)
        file = _find(name)
        return _read(file.read_bytes(), _source(file), options)

    @staticmethod
    def for_model(model_type: str, **options: Any) -> Policy:
        """The shipped policy whose family is a model's `model_type`; "auto" where there is none."""
        return Policy.load(_families().get(model_type, AUTO), **options)

    @property
    def name(self) -> str:
        """What `load` takes for this policy: the name of a shipped file, or a path."""
        return next((stem for stem, path in _shipped().items() if _source(path) == self.source), self.source)

    def replace(self, **options: Any) -> Policy:
        """The same policy with these options in place of its own."""
        return replace(self, asked={**self.asked, **options})

    def as_dict(self) -> dict[str, Any]:
        """The policy for reports: plain values, the options resolved."""
        return {
            "source": self.source,
            "family": self.family,
            "weights": {entry.pattern.text: entry.value for entry in self.weights},
            "units": {entry.pattern.text: entry.value for entry in self.units},
            "options": self.options.as_dict(),
        }

    def expected_kernels(self, layers: int) -> dict[str, int]:
        """Kernel -> how many of it a model with so many layers should have, at least."""
        return {name: count * layers if each else count for name, count, each in self.kernels}

    def mesh(self, world_size: int) -> Mesh:
        """The mesh over `world_size` ranks; data parallelism takes what the other degrees leave. Raises PolicyError."""
        options = self.options
        degrees = {"tensor": options.tensor, "pipeline": options.pipeline}
        named = " and ".join(f"{name} = {size}" for name, size in degrees.items() if size > 1 or name == "tensor")
        model = math.prod(degrees.values())
        if world_size < 1 or world_size % model:
            legal = ", ".join(str(n) for n in range(1, min(world_size, 1024) + 1) if world_size % n == 0)
            what = "tensor" if options.pipeline == 1 else "pipeline × tensor"
            hint = f": use {what} = {legal}" if legal else ""
            verb = "does" if options.pipeline == 1 else "do"
            raise PolicyError(f"{self.source}: {named} {verb} not divide a world of {world_size} ranks{hint}")
        left = world_size // model
        if options.data not in (None, left):
            raise PolicyError(
                f"{self.source}: {named.replace(' and', ',')} and data = {options.data} make {model * options.data} ranks, "
                f"but the world has {world_size}: use data = {left}, or leave it out"
            )
        if left % options.replicate:
            legal = ", ".join(str(n) for n in range(1, left + 1) if left % n == 0)
            raise PolicyError(f"{self.source}: replicate = {options.replicate} does not divide data = {left}: use {legal}")
        return Mesh(pp=options.pipeline, dp=left, tp=options.tensor, replicas=options.replicate)

    def weight_entries(
        self, parameters: Iterable[str], aliases: Mapping[str, str] | None = None, model_type: str | None = None
    ) -> dict[str, str]:
        """Parameter name -> the word of [weights] that its module has; a parameter that no entry names is absent.

        aliases: another name of a tied parameter -> its name. Raises PolicyError for every entry that does not fit the model.
        """
        found, faults = self._weights(parameters, aliases or {})
        self._raise(faults, self.weights, model_type)
        return found

    def unit_kinds(self, modules: Iterable[str], model_type: str | None = None) -> dict[str, str]:
        """Module path -> kind of unit, in the order given, for the modules that [units] names.

        Raises PolicyError for every entry that does not fit the model.
        """
        found, faults = self._units(modules)
        self._raise(faults, self.units, model_type)
        return found

    def check(
        self,
        parameters: Iterable[str],
        modules: Iterable[str],
        aliases: Mapping[str, str] | None = None,
        model_type: str | None = None,
    ) -> None:
        """Raise one PolicyError with everything for which `weight_entries` and `unit_kinds` would raise theirs."""
        faults = self._weights(parameters, aliases or {})[1] + self._units(modules)[1]
        self._raise(faults, (*self.weights, *self.units), model_type)

    def _weights(self, parameters: Iterable[str], aliases: Mapping[str, str]) -> tuple[dict[str, str], list[Fault]]:
        held = parameters if isinstance(parameters, Mapping) else {}
        names = {name: name for name in parameters} | dict(aliases)
        modules = {name: held[name].module if name in held else name.rpartition(".")[0] for name in names}
        claims, faults = claim(self.weights, dict.fromkeys(modules.values()))
        found: dict[str, tuple[str, Entry]] = {}
        for name, first in names.items():
            entry = claims.get(modules[name])
            if entry is None:
                continue
            known, other = found.setdefault(first, (name, entry))
            if other.value != entry.value:
                faults.append(
                    Fault(f"{name} is tied to {known}, but {entry} says {entry.value} and {other} says {other.value}: use one")
                )
        return {name: entry.value for name, (_, entry) in found.items()}, faults

    def _units(self, modules: Iterable[str]) -> tuple[dict[str, str], list[Fault]]:
        claims, faults = claim(self.units, modules)
        for path, entry in claims.items():
            parts = path.split(".")
            outer = next((o for end in range(1, len(parts)) if (o := ".".join(parts[:end])) in claims), None)
            if outer is not None:
                faults.append(
                    Fault(f"{entry} makes {path} a unit inside the unit {outer} of {claims[outer]}: keep one of the two")
                )
        return {path: entry.value for path, entry in claims.items()}, faults

    def _raise(self, faults: list[Fault], entries: tuple[Entry, ...], model_type: str | None) -> None:
        texts = [fault.text for fault in faults]
        lost = sum(fault.idle for fault in faults)
        if model_type not in (None, self.family) and lost * 2 > len(entries):
            files = _families()
            right = (
                f"use {_SHIPPED}/{files[model_type].name}"
                if model_type in files
                else f"no file has that family: use {AUTO}. {_own(files)}"
            )
            texts.insert(0, f"this policy is for the family {self.family!r}, but the model's type is {model_type!r}: {right}")
        raise_all(PolicyError, self.source, texts)


def _read(text: bytes, source: str, options: Mapping[str, Any]) -> Policy:
    """The policy that a file's text and the caller's options make; every fault of either in one PolicyError."""
    try:
        written = text.decode()
        parsed = tomllib.loads(written)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(f"{source} is not a TOML file: {error}") from error
    lines = _lines(written)

    def place(table: str, key: str) -> str:
        return f"line {lines[table, key]}: " if (table, key) in lines else ""

    faults = []
    for key in parsed:
        if key not in ("family", "options", "kernels", *_TABLES):
            close = nearest(key, ("family", "options", "kernels", *_TABLES))
            hint = f"did you mean {close!r}?" if close else "a policy has 'family', [weights], [units], [kernels] and [options]"
            faults.append(f"{place(key, '') or place('', key)}unknown key or table {key!r}: {hint}")
    family = parsed.get("family")
    if not isinstance(family, str) or not family:
        said = "no family" if family is None else f"{place('', 'family')}family = {json.dumps(family, default=repr)}"
        faults.append(f'{said}: write family = "..." with the model_type of the models that the policy is for')
    entries = {table: _entries(table, parsed.get(table, {}), lines, faults) for table in _TABLES}
    written_options = parsed.get("options", {})
    if not isinstance(written_options, dict):
        faults.append(f"{place('', 'options')}options is a table: write [options] on a line of its own")
        written_options = {}
    faults += violations(written_options, lambda name: place("options", name))
    kernels = _kernels(parsed.get("kernels", {}), lambda name: place("kernels", name), faults)
    raise_all(PolicyError, source, faults + violations(options))
    return Policy(str(family), entries["weights"], entries["units"], {**written_options, **options}, source, kernels=kernels)


def _kernels(written: Any, place: Callable[[str], str], faults: list[str]) -> tuple[tuple[str, int, bool], ...]:
    """The entries of [kernels]; what is wrong with them goes to `faults`."""
    if not isinstance(written, dict):
        faults.append("kernels is not a table: write [kernels] on a line of its own, and the entries below it")
        return ()
    found = []
    for name, value in written.items():
        each = re.fullmatch(r"(\d+) per layer", value) if isinstance(value, str) else None
        count = int(each[1]) if each else value
        if name not in COUNTED:
            close = nearest(name, COUNTED)
            hint = f"did you mean {close!r}?" if close else f"use {', '.join(COUNTED)}"
            faults.append(f"{place(name)}unknown kernel {name!r}: {hint}")
        elif type(count) is not int or count < 0:
            shown = json.dumps(value, default=repr)
            faults.append(f'{place(name)}{name} = {shown}: use a number, such as 32, or "1 per layer"')
        else:
            found.append((name, count, each is not None))
    return tuple(found)


def _entries(table: str, written: Any, lines: Mapping[tuple[str, str], int], faults: list[str]) -> tuple[Entry, ...]:
    """The entries of [weights] or [units]; what is wrong with them goes to `faults`."""
    if not isinstance(written, dict):
        faults.append(f"{table} is not a table: write [{table}] on a line of its own, and the entries below it")
        return ()
    found = []
    for key, value in written.items():
        line = lines.get((table, key), 0)
        where = f"line {line}: " if line else f"[{table}]: "
        if isinstance(value, dict):
            faults.append(f"{where}{key} = ...: a pattern stands in quotes, or TOML takes its dots for tables")
            continue
        if value not in _TABLES[table]:
            close = nearest(str(value), _TABLES[table])
            hint = f"; the nearest is {close}" if close else ""
            faults.append(f'{where}"{key}" = {json.dumps(value, default=repr)}: use {", ".join(_TABLES[table])}{hint}')
        try:
            found.append(Entry(parse(key), str(value), line))
        except ValueError as error:
            faults.append(f'{where}"{key}": {error}')
    return tuple(found)


def _lines(text: str) -> dict[tuple[str, str], int]:
    """(table, key) -> the line it is written on; (table, "") is the table's own heading. The parser of TOML does not say."""
    found: dict[tuple[str, str], int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if heading := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = heading[1].strip("\"'")
            found.setdefault((table, ""), number)
        elif key := re.match(r"""\s*(?:"([^"]+)"|'([^']+)'|([\w-]+))""", line):
            found.setdefault((table, key[1] or key[2] or key[3]), number)
    return found


def _find(name: str | Path) -> Path:
    """The file of a policy that is given by name or path."""
    files = _shipped()
    if isinstance(name, str) and name in files:
        return files[name]
    path = Path(name)
    if path.is_file():
        return path
    for file in files.values():
        if path == Path(_source(file)):  # as messages and reports name it, from whatever directory
            return file
    if path.suffix or len(path.parts) != 1:
        raise PolicyError(f"no policy file {str(path)!r}; shipped with shardcomp: {', '.join(files)}")
    close = nearest(str(name), files)
    hint = f"did you mean {close!r}? " if close else ""
    raise PolicyError(f"no policy {str(name)!r}: {hint}There are {AUTO}, {', '.join(files)}; or give the path of a file")


def _shipped() -> dict[str, Path]:
    """Name -> file of the policies that come with shardcomp."""
    folder = Path(str(resources.files("shardcomp.policies")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _families() -> dict[str, Path]:
    """Family -> file of the policies that come with shardcomp."""
    return {tomllib.loads(path.read_text())["family"]: path for path in _shipped().values()}


def _source(path: Path) -> str:
    return f"{_SHIPPED}/{path.name}" if path in _shipped().values() else str(path)


def _listed(files: Mapping[str, Path]) -> str:
    return ", ".join(f"{path.name} ({family})" if path.stem != family else path.name for family, path in files.items())


def _own(files: Mapping[str, Path]) -> str:
    return f"Write one after the example of those in {_SHIPPED}/ ({_listed(files)})"
