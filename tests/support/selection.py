"""Which cases of a test `make test` runs: as many as fit in a few seconds, chosen so that they differ as much as possible.

tests/durations.json has the CPU seconds of a case of each test. `pytest --update-durations` writes those of the tests that it
runs.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

LONG = os.environ.get("SHARDCOMP_LONG") == "1"
"""Whether every case runs, with many more draws: `make long`."""
PARTS = 8 if LONG else 1
"""Into how many tests the draws of one are cut, so that processes and slices share them."""
DURATIONS = Path(__file__).parents[1] / "durations.json"
BUDGET = 0.7
"""CPU seconds for all cases of a test. One case runs in any case."""
_LEAST = 0.05
"""Shorter cases are not worth a line of the file."""
GRID_SHARE = 4
"""Of the cases of a grid, one in so many runs."""

Values = Mapping[str, int]
"""The parameters of a case: name -> index of its value."""


def read_durations() -> dict[str, float]:
    """file::test -> CPU seconds of one case."""
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def count_to_run(cases: int, seconds: float, grid: bool) -> int:
    """How many of the cases run, at least one. seconds: the CPU time of a case, 0 where it was not measured."""
    fitting = int(BUDGET / seconds) if seconds else cases
    return max(1, min(fitting, -(-cases // GRID_SHARE) if grid else cases))


def choose(cases: Mapping[str, Values], count: int) -> set[str]:
    """The names of `count` cases: one after the other, the case with the most values, then pairs of values, that none before it
    has. The same cases are chosen each time; which of equally good ones depends on the name."""
    chosen: set[str] = set()
    seen: set[object] = set()
    while len(chosen) < min(count, len(cases)):

        def gain(name: str) -> tuple[int, int, int]:
            values, pairs = _traits(cases[name])
            return len(values - seen), len(pairs - seen), zlib.crc32(name.encode())

        best = max((name for name in cases if name not in chosen), key=gain)
        chosen.add(best)
        seen.update(*_traits(cases[best]))
    return chosen


def _traits(values: Values) -> tuple[set[object], set[object]]:
    """The values of a case, and its pairs of values."""
    return set(values.items()), set(itertools.combinations(sorted(values.items()), 2))


def write_durations(measured: Mapping[str, list[float]]) -> None:
    """Put new measurements in the file. measured: file::test -> CPU seconds of each case that ran."""
    means = {name: sum(values) / len(values) for name, values in measured.items()}
    seconds = read_durations() | {name: round(mean, 2) for name, mean in means.items()}
    DURATIONS.write_text(
        json.dumps({name: seconds[name] for name in sorted(seconds) if seconds[name] >= _LEAST}, indent=1) + "\n"
    )
