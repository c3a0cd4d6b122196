"""The notation of sharding rules."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from shardcomp.sharding import notation


def test_the_examples_run() -> None:
    assert doctest.testmod(notation) == (0, 2)


def test_the_parser_needs_no_torch() -> None:
    code = "import sys, shardcomp.sharding.notation; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "False\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("r i, i o", "no '->' between operands and results"),
        ("r I -> r", "'I' is not a factor"),
        ("r i -> r | exact", "'exact' is not an option"),
    ],
)
def test_a_wrong_line_is_refused_by_what_is_wrong_with_it(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        notation.parse(line)


def test_further_dimensions_are_counted_from_the_right() -> None:
    assert notation.factors_of(("...", "i"), rank=2, leading=2) == ("_1", "i")
    assert notation.factors_of(("r", "i!"), rank=2, leading=0) == ("r", None)
    assert notation.factors_of(("r", "i"), rank=3, leading=0) is None
