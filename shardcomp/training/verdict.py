"""Who holds up a job, told from what its ranks answer and from which of them do not.

shardcomp: no progress for 300 s; no answer from rank 5 on node3: died or is stopped; last sign of life 302 s ago, …
  ranks 0-4, 6 and 7 waiting in all_reduce over tp (train.py:81); last beat: step 41, 300 s ago
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from shardcomp.training.stack_location import Place, listed

K = TypeVar("K")

_NO_BEAT = "none"
_MAX_LINES = 12
"""Lines of a message about where ranks are."""


@dataclass(frozen=True)
class Answer:
    """What a rank says when it is asked where it is.

    beat, age: its last progress, and the seconds since. failure: how a collective failed on this rank. next_silent: the seconds
    since the last sign of life of the next rank.
    """

    place: Place
    beat: str
    age: float
    failure: str = ""
    next_silent: float = 0.0

    @staticmethod
    def read(text: str) -> Answer:
        """From the JSON that a rank wrote."""
        fields = json.loads(text)
        return Answer(**{**fields, "place": Place(**fields["place"])})


@dataclass(frozen=True)
class MissingRank:
    """What is known of a rank that does not answer.

    host: its machine, None if it never started a watchdog. beat: its last progress. silent: the seconds since its last sign of
    life. left: why it stopped its watchdog, if it did.
    """

    host: str | None = None
    beat: str | None = None
    silent: float | None = None
    left: str | None = None


def verdict(reason: str, answers: Mapping[int, Answer], missing: Mapping[int, MissingRank]) -> str:
    """The message: its first line says who holds up the job, the others where all other ranks are.

    Args:
        reason: why the ranks were asked.
        answers: by rank.
        missing: the ranks that do not answer.
    """
    busy = {rank: answer for rank, answer in answers.items() if answer.place.kind == "code"}
    waiting = {rank: answer for rank, answer in answers.items() if rank not in busy}
    ops = [answer.place.what for answer in waiting.values()]
    usual = max(ops, key=ops.count, default="")
    elsewhere = [rank for rank, answer in waiting.items() if answer.place.what != usual and answer.place.kind == "collective"]
    listed_answers = answers
    if missing:
        culprits = _describe_missing(missing)
    elif busy:
        culprits, listed_answers = [f"held up by {text}" for text in describe(busy)], waiting
    elif elsewhere and not any(answer.failure for answer in answers.values()):
        culprits = [f"all wait, but {_ranks(elsewhere)} in another collective than the rest: their programs diverged"]
    else:
        culprits = ["all ranks answer, and wait in one collective: the network or a device does not deliver"]
    failures = _by_value({rank: answer.failure for rank, answer in answers.items() if answer.failure})
    lines = [f"  {line}" for line in describe(listed_answers)]
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"  and {len(lines) - _MAX_LINES} more lines of other ranks"]
    lines += [f"  what failed on {_ranks(ranks)}: {failure}" for failure, ranks in list(failures.items())[:3]]
    return "\n".join([f"shardcomp: {reason}; {'; '.join(culprits)}", *lines])


def describe(answers: Mapping[int, Answer]) -> list[str]:
    """Where ranks are. Those at the same place share a line."""
    lines = []
    for text, ranks in _by_value({rank: _place(answer) for rank, answer in answers.items()}).items():
        beats = dict.fromkeys(answers[rank].beat or _NO_BEAT for rank in ranks)
        age = max(answers[rank].age for rank in ranks)
        lines.append(f"{_ranks(ranks)} {text}; last beat: {' and '.join([*beats][:3])}, {age:.0f} s ago")
    return lines


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, without gloo's source file, address and advice."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().partition("\n")[0])
    return re.sub(r" ?\[\S+\]:\d+", "", text.partition(". This is typically")[0])[:300]


def _describe_missing(missing: Mapping[int, MissingRank]) -> list[str]:
    """Who does not answer, and what is known of them. Ranks of which the same is known share a text."""
    left = {rank: known.left for rank, known in missing.items() if known.left is not None}
    texts = [f"{_ranks(ranks)} left: {why}" for why, ranks in _by_value(left).items()]
    never_started = [rank for rank, known in missing.items() if known.left is None and known.host is None]
    if never_started:
        texts.append(f"no answer from {_ranks(never_started)}, where no watchdog was started")
    died = {rank: (known.host, known.beat) for rank, known in missing.items() if known.left is None and known.host is not None}
    for (host, beat), ranks in _by_value(died).items():
        silences = [silent for rank in ranks if (silent := missing[rank].silent) is not None]
        since = f"last sign of life {max(silences):.0f} s ago, " if silences else ""
        texts.append(
            f"no answer from {_ranks(ranks)} on {host}: died or is stopped; {since}last known beat: {beat or _NO_BEAT}"
        )
    return texts


def _place(answer: Answer) -> str:
    if answer.place.kind == "code":
        return f"at {answer.place}, not in a collective"
    return f"waiting {'in' if answer.place.kind == 'collective' else 'for'} {answer.place}"


def _by_value(values: Mapping[int, K]) -> dict[K, list[int]]:
    """Value -> the ranks that have it."""
    ranks_of: dict[K, list[int]] = {}
    for rank, value in values.items():
        ranks_of.setdefault(value, []).append(rank)
    return ranks_of


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
