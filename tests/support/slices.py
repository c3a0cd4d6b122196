"""One slice of all tests, for `SLICE=3/8 make long`: which slice a test is in depends on its name alone."""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Slice:
    """The tests of one run, of `count` that have all of them together. number: 1 to count."""

    number: int
    count: int

    def __contains__(self, test: object) -> bool:
        return zlib.crc32(str(test).encode()) % self.count == self.number - 1


def parse_slice(text: str) -> Slice:
    """The slice that a text like 3/8 names; an empty text names all tests. Raises ValueError for any other text."""
    if not text:
        return Slice(1, 1)
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise ValueError(
            f"SLICE={text}: use SLICE=3/8 for the third eighth of all tests, or any other number/count from 1/count"
        )
    return Slice(int(numbers[1]), int(numbers[2]))


def slice_of_environment() -> Slice:
    """The slice that SHARDCOMP_SLICE names. Raises UsageError, which pytest shows as one line, where it names none."""
    try:
        return parse_slice(os.environ.get("SHARDCOMP_SLICE", ""))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
