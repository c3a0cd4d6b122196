"""The options of a policy: their legal values, all checked together, and the command-line flags of the same names."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from shardcomp.errors import PolicyError, raise_all
from shardcomp.patterns import nearest


@dataclass(frozen=True)
class Legal:
    """The values that an option takes: in words, as a flag's placeholder, and as a test."""

    words: str
    placeholder: str
    accepts: Callable[[object], bool]
    suggestions: tuple[str, ...] = ()


def _from(least: int) -> Legal:
    return Legal(f"a whole number, {least} or more", "N", lambda v: type(v) is int and least <= v < 2**63)


def _word(*words: str) -> Legal:
    return Legal(_either(words), "{" + ",".join(words) + "}", lambda v: v in words, words)


def _either(words: tuple[str, ...]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


_SWITCH = Legal("true or false", "{true,false}", lambda v: type(v) is bool)


def _option(default: Any, legal: Legal, meaning: str) -> Any:
    return field(default=default, metadata={"legal": legal, "meaning": meaning})


@dataclass(frozen=True)
class Options:
    """What a policy asks for beside the split of weights. Raises PolicyError that lists every value that is not legal.

    `data` None: what the other degrees leave of the ranks. `micro_batch` None: the whole batch of a rank. `sequence_parallel`
    may be given as None, for `tensor > 1`, and reads as true or false; over tensor = 1 the sequence is one piece, either way.
    """

    tensor: int = _option(1, _from(1), "degree of tensor parallelism (default 1)")
    data: int | None = _option(None, _from(1), "degree of data parallelism (default: the ranks that are left)")
    sequence_parallel: bool | None = _option(
        None, _SWITCH, "split the activations between tensor-parallel blocks by sequence (default: true when tensor > 1)"
    )
    micro_batch: int | None = _option(None, _from(1), "samples per micro-batch (default: the whole batch)")
    precision: str = _option("bf16", _word("bf16", "fp32", "fp64"), "the dtype to compute in (default bf16)")
    seed: int = _option(0, _from(0), "seed of the initial weights and of dropout (default 0)")

    def __post_init__(self) -> None:
        raise_all(PolicyError, "options", violations({name: getattr(self, name) for name in _FIELDS}))
        if self.sequence_parallel is None:
            object.__setattr__(self, "sequence_parallel", self.tensor > 1)

    def as_dict(self) -> dict[str, Any]:
        """Option name -> value."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS: dict[str, Field[Any]] = {option.name: option for option in fields(Options)}


def violations(asked: Mapping[str, object], place: Callable[[str], str] = lambda name: "") -> list[str]:
    """A message for every name that is no option and every value that is not legal. `place(name)` says where it was written."""
    found = []
    for name, value in asked.items():
        if name not in _FIELDS:
            close = nearest(name, _FIELDS)
            hint = f"did you mean {close!r}? The options are" if close else "the options are"
            found.append(f"{place(name)}unknown option {name!r}: {hint} {', '.join(_FIELDS)}")
            continue
        legal: Legal = _FIELDS[name].metadata["legal"]
        if legal.accepts(value) or (value is None and _FIELDS[name].default is None):
            continue
        close = nearest(str(value), legal.suggestions)
        shown = json.dumps(value, default=repr)
        hint = f"; the nearest is {close}" if close else ""
        found.append(f"{place(name)}{name} = {shown}: use {legal.words}{hint}")
    return found


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag for each option: `--a-b` for `a_b`. The policy checks the values, and shows all faults at once."""
    group = parser.add_argument_group("options of the policy", "each wins over the policy file")
    for name, option in _FIELDS.items():
        legal: Legal = option.metadata["legal"]
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=_read, metavar=legal.placeholder, help=option.metadata["meaning"])


def options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The options whose flags were given, by name."""
    return {name: value for name in _FIELDS if (value := getattr(args, name, None)) is not None}


def flags(asked: Mapping[str, Any]) -> list[str]:
    """The flags that ask for these options: what `options_from` reads back."""
    shown = {name: value for name, value in asked.items() if value is not None}
    return [
        word
        for name, value in shown.items()
        for word in ("--" + name.replace("_", "-"), str(value).lower() if isinstance(value, bool) else str(value))
    ]


def _read(text: str) -> int | bool | str:
    """A flag's value as a policy file would have it; a word that is neither number nor switch stays text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return text
