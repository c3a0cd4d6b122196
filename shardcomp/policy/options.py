"""The options of a policy: their legal values, all checked together, and the command-line flags of the same names.

To add an option, add a field to `Options`. Its flag, its check, its key in policy files and its documentation follow.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from shardcomp.errors import PolicyError, raise_all
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.policy.patterns import nearest, parse


@dataclass(frozen=True)
class Legal:
    """The values that an option takes: in words, as a flag's placeholder, and as a test. `suggestions` are the words among
    them, of which a message names the nearest."""

    words: str
    placeholder: str
    accepts: Callable[[object], bool]
    suggestions: tuple[str, ...] = ()


def _at_least(least: int) -> Legal:
    # type() rather than isinstance(): true is not a number here.
    return Legal(f"a whole number, {least} or more", "N", lambda value: type(value) is int and least <= value < 2**63)


def _one_of(*words: str) -> Legal:
    return Legal(_or(words), "{" + ",".join(words) + "}", lambda value: value in words, words)


def _or(words: tuple[str, ...]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _is_recompute(value: object) -> bool:
    if not isinstance(value, str):
        return False
    number = value.removeprefix("every:")
    return value in RECOMPUTE or (number != value and number.isdigit() and int(number) > 0)


def _is_offload(value: object) -> bool:
    """Whether this is a word, one pattern of units as text, or several as a list."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not patterns:
        return False
    try:
        return value in OFFLOAD or all(parse(pattern) for pattern in patterns)
    except (ValueError, TypeError, AttributeError):
        return False


def _is_layer_counts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(n) is int and n > 0 for n in value)


def _is_kernels(value: object) -> bool:
    """Whether this is a word, or names of kernels with a minus: as text with commas between them, or as a list."""
    return value in KERNELS or _is_words(value) and all(name in _LEFT_OUT for name in _names(value))


def _is_words(value: object) -> bool:
    return isinstance(value, str) or isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def _names(value: Any) -> list[str]:
    """The names in a value of `kernels`."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]


KERNELS = ("all", "none")
PLACED = ("rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu", "geglu", "linear_cross_entropy")
"""The kernels that a policy may leave out."""
_LEFT_OUT = tuple(f"-{name}" for name in PLACED)
RECOMPUTE = ("none", "full", "selective")
OFFLOAD = ("none", "optimizer", "parameters", "all")
_SWITCH = Legal("true or false", "{true,false}", lambda value: type(value) is bool)


def _option(default: Any, legal: Legal, meaning: str) -> Any:
    return field(default=default, metadata={"legal": legal, "meaning": meaning})


@dataclass(frozen=True)
class Options:
    """What a policy asks for beside how weights split.

    A default of None depends on other options. `data` takes the ranks that the other degrees leave. `micro_batch` is the whole
    batch of a rank. `sequence_parallel` becomes true where `tensor` is above 1, and does nothing elsewhere. `virtual_stages`
    becomes the number that the schedule needs.

    Raises:
        PolicyError: every value that is not legal, and every two options that exclude each other.

    Example:
        >>> Options(tensor=2).sequence_parallel
        True
        >>> Options(tensor=0, precision="fp8")
        Traceback (most recent call last):
        ...
        shardcomp.errors.PolicyError: options: 2 violations
          1. tensor = 0: use a whole number, 1 or more
          2. precision = "fp8": use bf16, fp32, fp16 or fp64
    """

    tensor: int = _option(1, _at_least(1), "degree of tensor parallelism (default 1)")
    data: int | None = _option(None, _at_least(1), "degree of data parallelism (default: the ranks that are left)")
    pipeline: int = _option(1, _at_least(1), "degree of pipeline parallelism (default 1)")
    sequence_parallel: bool | None = _option(
        None, _SWITCH, "split the activations between tensor-parallel blocks by sequence (default: true when tensor > 1)"
    )
    zero: int = _option(
        0,
        Legal("0, 1, 2 or 3", "{0,1,2,3}", lambda value: type(value) is int and 0 <= value <= 3),
        "what data-parallel ranks shard: 1 optimizer states, 2 also gradients, 3 also parameters (default 0: nothing)",
    )
    replicate: int = _option(1, _at_least(1), "copies of what zero shards: each group of data / N ranks has one (default 1)")
    schedule: str = _option("1f1b", _one_of(*SCHEDULES), "the order of forwards and backwards in a pipeline (default 1f1b)")
    virtual_stages: int | None = _option(
        None, _at_least(1), "how many stages each pipeline rank has (default: 2 for interleaved, zbv and dualpipev, else 1)"
    )
    stage_layers: tuple[int, ...] | None = _option(
        None,
        Legal("the number of layers of each stage, such as 8,8,8,7", "N,N,...", _is_layer_counts),
        "how many layers each stage has (default: balanced by cost)",
    )
    recompute: str = _option(
        "none",
        Legal(f"{', '.join(RECOMPUTE)} or every:N", "{none,full,selective,every:N}", _is_recompute, RECOMPUTE),
        "which values the backward recomputes instead of keeping them: activation checkpointing (default none)",
    )
    offload: str | tuple[str, ...] = _option(
        "none",
        Legal(f"{', '.join(OFFLOAD)} or patterns of units", "{none,optimizer,parameters,all,PATTERN}", _is_offload, OFFLOAD),
        "what is kept in the host's memory: optimizer states, also parameters, or all of the units that match (default none)",
    )
    micro_batch: int | None = _option(None, _at_least(1), "samples per micro-batch (default: the whole batch)")
    precision: str = _option("bf16", _one_of("bf16", "fp32", "fp16", "fp64"), "the dtype to compute in (default bf16)")
    kernels: str | tuple[str, ...] = _option(
        "all",
        Legal(
            f"{', '.join(KERNELS)}, or a list of {', '.join(_LEFT_OUT)}",
            "{all,none,-NAME}",
            _is_kernels,
            (*KERNELS, *_LEFT_OUT),
        ),
        "which fused kernels replace subgraphs that compute the same: -NAME,-NAME for all but these (default all)",
    )
    numerics: str = _option(
        "hf",
        _one_of("hf", "fp32"),
        "how kernels round: bit for bit as the model does, or once, from float32, where that is equivalent (default hf)",
    )
    attention: str = _option(
        "auto",
        _one_of("auto", "sdpa", "sdpa:cudnn", "flash3", "xformers", "eager"),
        "what runs attention; a named one runs or is refused (default auto: what torch chooses among its own kernels)",
    )
    compile: bool = _option(False, _SWITCH, "compile every unit with torch.compile (default false)")
    compare_ranks: bool = _option(
        True,
        _SWITCH,
        "check that ranks agree: on the weights at the start, on every batch within a pp and tp group (default true)",
    )
    seed: int = _option(0, _at_least(0), "seed of the initial weights and of dropout (default 0)")

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in _FIELDS}
        raise_all(PolicyError, "options", option_violations(asked))
        for name, value in asked.items():
            if isinstance(value, list):  # TOML's; a tuple can be hashed
                object.__setattr__(self, name, tuple(value))
        if self.sequence_parallel is None:
            object.__setattr__(self, "sequence_parallel", self.tensor > 1)
        if self.virtual_stages is None:
            object.__setattr__(self, "virtual_stages", SCHEDULES[self.schedule].stages_per_rank if self.pipeline > 1 else 1)
        raise_all(PolicyError, "options", self._conflicts())

    def places(self, kernel: str) -> bool:
        """Whether this kernel may replace subgraphs that compute the same."""
        return self.kernels != "none" and f"-{kernel}" not in _names(self.kernels)

    @property
    def ranks(self) -> int:
        """How many ranks these degrees make, with data = 1 by default."""
        return self.pipeline * (self.data or 1) * self.tensor

    @property
    def stages(self) -> int:
        """How many stages all pipeline ranks have together."""
        assert self.virtual_stages is not None
        return self.pipeline * self.virtual_stages

    def _conflicts(self) -> list[str]:
        """A message for every option that another one excludes."""
        conflicts = []
        schedule, virtual = SCHEDULES[self.schedule], self.virtual_stages
        if self.pipeline == 1 and virtual != 1:
            conflicts.append(f"virtual_stages = {virtual} needs a pipeline: use pipeline = 2 or more, or leave it out")
        elif self.pipeline > 1 and not schedule.interleaves and virtual != schedule.stages_per_rank:
            several = _or(tuple(name for name, other in SCHEDULES.items() if other.interleaves))
            conflicts.append(
                f"virtual_stages = {virtual}, but {self.schedule} runs {schedule.stages_per_rank} on each rank: "
                f"leave it out, or use schedule = {several}"
            )
        elif self.stage_layers is not None and len(self.stage_layers) != self.stages:
            conflicts.append(
                f"stage_layers names {len(self.stage_layers)} stages, but pipeline × virtual stages = {self.pipeline} × "
                f"{virtual} makes {self.stages}: give {self.stages} numbers"
            )
        if self.compile and self.pipeline > 1 and schedule.splits_backward:
            unsplit = _or(tuple(name for name, other in SCHEDULES.items() if not other.splits_backward))
            conflicts.append(
                f"compile = true makes the backward of each unit one node, which {self.schedule} would run twice: use "
                f"schedule = {unsplit}, or compile = false"
            )
        if self.replicate > 1 and self.zero == 0:
            conflicts.append(
                f"replicate = {self.replicate} makes copies of what zero shards, but zero = 0: use zero = 1, 2 or 3"
            )
        if self.data is not None and self.data % self.replicate:
            conflicts.append(f"replicate = {self.replicate} does not divide data = {self.data}: use {_divisors(self.data)}")
        if self.offload not in ("none", "optimizer") and self.zero != 3:
            conflicts.append(
                f"offload = {_text(self.offload)} leaves no parameters on the device between uses, as zero = 3 does, "
                f"but zero = {self.zero}: use zero = 3, or offload = optimizer"
            )
        return conflicts

    def as_dict(self) -> dict[str, Any]:
        """Option name -> value."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS: dict[str, Field[Any]] = {option.name: option for option in fields(Options)}


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def option_violations(asked: Mapping[str, object], place: Callable[[str], str] = lambda name: "") -> list[str]:
    """A message for every name that is not an option, and for every value that is not legal. `place(name)` says where it is
    written, as the message begins."""
    violations = []
    for name, value in asked.items():
        if name not in _FIELDS:
            close = nearest(name, _FIELDS)
            hint = f"did you mean {close!r}? The options are" if close else "the options are"
            violations.append(f"{place(name)}unknown option {name!r}: {hint} {', '.join(_FIELDS)}")
            continue
        legal: Legal = _FIELDS[name].metadata["legal"]
        if legal.accepts(value) or (value is None and _FIELDS[name].default is None):
            continue
        close = nearest(str(value), legal.suggestions)
        shown = json.dumps(value, default=repr)
        hint = f"; the nearest is {close}" if close else ""
        violations.append(f"{place(name)}{name} = {shown}: use {legal.words}{hint}")
    return violations


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option to `parser`: `--a-b` for `a_b`. It is `Options` that checks the values, all at once.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_option_flags(parser)
        >>> options_from(parser.parse_args(["--tensor", "2", "--zero", "1"]))
        {'tensor': 2, 'zero': 1}
    """
    group = parser.add_argument_group("options of the policy", "a flag wins over the policy file")
    for name, option in _FIELDS.items():
        legal: Legal = option.metadata["legal"]
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, type=_read, metavar=legal.placeholder, help=option.metadata["meaning"])


def options_from(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line sets, by name."""
    return {name: value for name in _FIELDS if (value := getattr(args, name, None)) is not None}


def flags(asked: Mapping[str, Any]) -> list[str]:
    """The words of a command line that sets these options: what `options_from` reads back. None sets nothing.

    Example:
        >>> flags({"tensor": 2, "sequence_parallel": False, "data": None})
        ['--tensor', '2', '--sequence-parallel', 'false']
    """
    values = {name: value for name, value in asked.items() if value is not None}
    return [word for name, value in values.items() for word in _words("--" + name.replace("_", "-"), _text(value))]


def _words(flag: str, text: str) -> list[str]:
    """A flag and its value. They are one word where argparse would take the value for a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def joined(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--kernels -name` joined to `--kernels=-name`: argparse takes `-name` for a flag."""
    result: list[str] = []
    for word in words:
        if result and result[-1] == "--kernels" and word.startswith("-") and not word.startswith("--"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(text: str) -> int | bool | str | tuple[int, ...]:
    """The value of a flag, of the type that a policy file would give it. All but a switch, a number or numbers stays text."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"\d+(,\d+)+", text):
        return tuple(int(word) for word in text.split(","))
    try:
        return int(text)
    except ValueError:
        return text
