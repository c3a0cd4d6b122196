"""Which cases of a test `make test` runs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from support import selection
from support.selection import BUDGET, choose, count_to_run, read_durations, write_durations

ROOT = Path(__file__).parents[2]
GRID = {f"{a}-{b}-{c}": {"a": a, "b": b, "c": c} for a, b, c in itertools.product(range(4), range(3), range(2))}


def test_every_value_is_in_a_chosen_case_where_there_are_enough() -> None:
    values = {trait for name in choose(GRID, 4) for trait in GRID[name].items()}
    assert values == {trait for case in GRID.values() for trait in case.items()}


def test_every_pair_of_values_is_in_a_chosen_case_of_a_large_part() -> None:
    pairs = {pair for name in choose(GRID, 14) for pair in itertools.combinations(GRID[name].items(), 2)}
    assert pairs == {pair for case in GRID.values() for pair in itertools.combinations(case.items(), 2)}


@pytest.mark.parametrize("count", [1, 2, 24, 99])
def test_as_many_are_chosen_as_were_asked_for_and_always_the_same(count: int) -> None:
    assert len(choose(GRID, count)) == min(count, 24)
    assert choose(GRID, count) == choose(dict(reversed(GRID.items())), count)


def test_one_case_runs_however_long_it_takes_and_all_that_were_not_measured() -> None:
    assert count_to_run(8, 100 * BUDGET, grid=False) == count_to_run(8, 100 * BUDGET, grid=True) == 1
    assert count_to_run(8, BUDGET / 3, grid=False) == 3
    assert count_to_run(8, 0, grid=False) == 8
    assert count_to_run(8, 0, grid=True) == 2 and count_to_run(3, 0, grid=True) == 1


def test_durations_of_tests_that_take_time_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selection, "DURATIONS", tmp_path / "durations.json")
    write_durations({"slow": [1, 2], "fast": [0.01], "as_before": [3.0]})
    assert read_durations() == {"as_before": 3.0, "slow": 1.5}
    write_durations({"slow": [0.01]})
    assert read_durations() == {"as_before": 3.0}


def test_every_test_with_a_duration_exists() -> None:
    for name in read_durations():
        file, function = name.partition("::")[0], name.rpartition("::")[2]
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        assert re.search(rf"^ *def {function}\(", text, re.MULTILINE), f"{name}: rename it in tests/durations.json as well"
