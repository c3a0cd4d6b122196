"""The options of a policy: their legal values, all checked together, and the command-line flags of the same names."""

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


def _is_recompute(value: object) -> bool:
    if not isinstance(value, str):
        return False
    number = value.removeprefix("every:")
    return value in RECOMPUTE or (number != value and number.isdigit() and int(number) > 0)


def _is_offload(value: object) -> bool:
    """A word, or patterns of units: one as text, several as a list."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not patterns:
        return False
    try:
        return value in OFFLOAD or all(parse(pattern) for pattern in patterns)
    except (ValueError, TypeError, AttributeError):
        return False


def _is_counts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(n) is int and n > 0 for n in value)


def _is_kernels(value: object) -> bool:
    """A word, or names of kernels with a minus: one as text, several as a list or with commas between them."""
    return value in KERNELS or _is_list(value) and all(name in _LEFT_OUT for name in _names(value))


def _is_list(value: object) -> bool:
    return isinstance(value, str) or isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _names(value: Any) -> list[str]:
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]


KERNELS = ("all", "none")
PLACED = ("rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu", "geglu", "linear_cross_entropy")
"""The kernels that a policy may leave out."""
_LEFT_OUT = tuple(f"-{name}" for name in PLACED)
RECOMPUTE = ("none", "full", "selective")
OFFLOAD = ("none", "optimizer", "parameters", "all")
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
    pipeline: int = _option(1, _from(1), "degree of pipeline parallelism (default 1)")
    sequence_parallel: bool | None = _option(
        None, _SWITCH, "split the activations between tensor-parallel blocks by sequence (default: true when tensor > 1)"
    )
    zero: int = _option(
        0,
        Legal("0, 1, 2 or 3", "{0,1,2,3}", lambda v: type(v) is int and 0 <= v <= 3),
        "what data-parallel ranks share: 1 optimizer states, 2 gradients, 3 parameters as well (default 0: nothing)",
    )
    replicate: int = _option(1, _from(1), "copies of what zero shares: each group of data / N ranks has one (default 1)")
    schedule: str = _option("1f1b", _word(*SCHEDULES), "order of a pipeline's forwards and backwards (default 1f1b)")
    virtual_stages: int | None = _option(
        None, _from(1), "stages of one pipeline rank (default: 2 for interleaved, zbv and dualpipev, else 1)"
    )
    stage_layers: tuple[int, ...] | None = _option(
        None,
        Legal("the number of layers of each stage, such as 8,8,8,7", "N,N,...", _is_counts),
        "how many layers each stage has (default: balanced by cost)",
    )
    recompute: str = _option(
        "none",
        Legal(f"{', '.join(RECOMPUTE)} or every:N", "{none,full,selective,every:N}", _is_recompute, RECOMPUTE),
        "what a backward computes again instead of keeping it (default none)",
    )
    offload: str | tuple[str, ...] = _option(
        "none",
        Legal(f"{', '.join(OFFLOAD)} or patterns of units", "{none,optimizer,parameters,all,PATTERN}", _is_offload, OFFLOAD),
        "what the host keeps: the optimizer's, also the parameters, or those of the units that match (default none)",
    )
    micro_batch: int | None = _option(None, _from(1), "samples per micro-batch (default: the whole batch)")
    precision: str = _option("bf16", _word("bf16", "fp32", "fp16", "fp64"), "the dtype to compute in (default bf16)")
    kernels: str | tuple[str, ...] = _option(
        "all",
        Legal(
            f"{', '.join(KERNELS)}, or a list of {', '.join(_LEFT_OUT)}",
            "{all,none,-NAME}",
            _is_kernels,
            (*KERNELS, *_LEFT_OUT),
        ),
        "the fused kernels that are put in the place of what computes the same: -NAME,-NAME for all but these (default all)",
    )
    numerics: str = _option(
        "hf",
        _word("hf", "fp32"),
        "how kernels round: with the model's own bits, or once, from float32, wherever that means the same (default hf)",
    )
    attention: str = _option(
        "auto",
        _word("auto", "sdpa", "sdpa:cudnn", "flash3", "xformers", "eager"),
        "what runs attention: a named one runs or is refused (default auto: torch's choice among its own kernels)",
    )
    compile: bool = _option(False, _SWITCH, "let torch.compile run every unit (default false)")
    compare_ranks: bool = _option(
        True, _SWITCH, "compare the weights of all ranks when sharding, and every batch within a pp and tp group (default true)"
    )
    seed: int = _option(0, _from(0), "seed of the initial weights and of dropout (default 0)")

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in _FIELDS}
        raise_all(PolicyError, "options", violations(asked))
        for name, value in asked.items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.sequence_parallel is None:
            object.__setattr__(self, "sequence_parallel", self.tensor > 1)
        if self.virtual_stages is None:
            object.__setattr__(self, "virtual_stages", SCHEDULES[self.schedule].stages_per_rank if self.pipeline > 1 else 1)
        raise_all(PolicyError, "options", self._conflicts())

    def places(self, kernel: str) -> bool:
        """Whether this kernel may be put in the place of what computes the same."""
        return self.kernels != "none" and f"-{kernel}" not in _names(self.kernels)

    @property
    def ranks(self) -> int:
        """The ranks that these degrees make, with data = 1 where nothing is said of it."""
        return self.pipeline * (self.data or 1) * self.tensor

    @property
    def stages(self) -> int:
        """The stages of all pipeline ranks together."""
        assert self.virtual_stages is not None
        return self.pipeline * self.virtual_stages

    def _conflicts(self) -> list[str]:
        """A message for every option that another one forbids."""
        found = []
        schedule, virtual = SCHEDULES[self.schedule], self.virtual_stages
        if self.pipeline == 1 and virtual != 1:
            found.append(f"virtual_stages = {virtual} needs a pipeline: use pipeline = 2 or more, or leave it out")
        elif self.pipeline > 1 and not schedule.interleaves and virtual != schedule.stages_per_rank:
            several = _either(tuple(name for name, each in SCHEDULES.items() if each.interleaves))
            found.append(
                f"virtual_stages = {virtual}, but {self.schedule} runs {schedule.stages_per_rank} on each rank: "
                f"leave it out, or use schedule = {several}"
            )
        elif self.stage_layers is not None and len(self.stage_layers) != self.stages:
            found.append(
                f"stage_layers names {len(self.stage_layers)} stages, but pipeline × virtual stages = {self.pipeline} × "
                f"{virtual} makes {self.stages}: give {self.stages} numbers"
            )
        if self.compile and self.pipeline > 1 and schedule.splits_backward:
            whole = _either(tuple(name for name, each in SCHEDULES.items() if not each.splits_backward))
            found.append(
                f"compile = true makes each unit's backward one piece, which {self.schedule} would run twice: use "
                f"schedule = {whole}, or compile = false"
            )
        if self.replicate > 1 and self.zero == 0:
            found.append(f"replicate = {self.replicate} makes copies of what zero shares, but zero = 0: use zero = 1, 2 or 3")
        if self.data is not None and self.data % self.replicate:
            found.append(f"replicate = {self.replicate} does not divide data = {self.data}: use {_divisors(self.data)}")
        if self.offload not in ("none", "optimizer") and self.zero != 3:
            found.append(
                f"offload = {_text(self.offload)} leaves no parameters on the device between uses, as zero = 3 does, "
                f"but zero = {self.zero}: use zero = 3, or offload = optimizer"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Option name -> value."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS: dict[str, Field[Any]] = {option.name: option for option in fields(Options)}


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


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
    return [word for name, value in shown.items() for word in _words("--" + name.replace("_", "-"), _text(value))]


def _words(flag: str, text: str) -> list[str]:
    """A flag and its value; in one word where the value could be taken for a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def joined(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--kernels -name` as `--kernels=-name`, which alone argparse takes for a value."""
    found: list[str] = []
    for word in words:
        if found and found[-1] == "--kernels" and word.startswith("-") and not word.startswith("--"):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _text(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(text: str) -> int | bool | str | tuple[int, ...]:
    """A flag's value as a policy file would have it; a word that is neither number, numbers nor switch stays text."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"\d+(,\d+)+", text):
        return tuple(int(word) for word in text.split(","))
    try:
        return int(text)
    except ValueError:
        return text
