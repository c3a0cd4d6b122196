"""A run that is killed at any moment ends as one that nobody disturbed, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from measure.kills import measure
from support.selection import LONG


@pytest.mark.long  # verification/test_resumption.py kills one run and compares it
def test_kills_change_no_bit(tmp_path: Path) -> None:
    kills, inside = (30, 10) if LONG else (2, 1)
    found = measure(tmp_path, kills, inside, "--tensor 2", 2, random.randrange(2**31), print)
    assert sum(bool(kill.partial) for kill in found.kills) >= inside
    assert all(kill.resumed is not None and kill.resumed <= kill.step for kill in found.kills)
    assert found.losses_equal and found.files_equal, found.kills
