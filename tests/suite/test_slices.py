"""The slices of `SLICE=3/8 make long`."""

from __future__ import annotations

import pytest

from support.slices import Slice, parse_slice, slice_of_environment

NAMES = [f"tests/folder/test_file.py::test_{n}[{n % 7}]" for n in range(1000)]


@pytest.mark.parametrize("count", [1, 2, 8, 13])
def test_the_slices_are_disjoint_and_together_everything(count: int) -> None:
    slices = [[name for name in NAMES if name in Slice(number, count)] for number in range(1, count + 1)]
    assert sorted(name for names in slices for name in names) == sorted(NAMES)
    assert all(len(names) > len(NAMES) / count / 2 for names in slices)


def test_a_slice_is_read_from_its_text() -> None:
    assert parse_slice("3/8") == Slice(3, 8)
    assert all(name in parse_slice("") for name in NAMES)


@pytest.mark.parametrize("text", ["3", "0/8", "9/8", "a/8", "3/8/2", "-1/8", "1/0", " "])
def test_a_text_that_names_no_slice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^SLICE={text}: use SLICE=3/8 "):
        parse_slice(text)


def test_pytest_refuses_such_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDCOMP_SLICE", "2/3")
    assert slice_of_environment() == Slice(2, 3)
    monkeypatch.setenv("SHARDCOMP_SLICE", "9/8")
    with pytest.raises(pytest.UsageError, match="^SLICE=9/8: use "):
        slice_of_environment()
