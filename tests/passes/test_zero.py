"""What each unit's ranks share: the pass writes it into the plans of the units, and no line of the listing changes."""

from __future__ import annotations

import pytest

from shardcomp.errors import PolicyError
from support.listings import before_and_after, lower_gated_model


def test_zero_3_reshards_each_unit_and_changes_no_line() -> None:
    lowered = lower_gated_model(data=2, zero=3)
    before, after = before_and_after(lowered, "zero", "Layer")
    assert before == after != ""
    assert not any(unit.plan.reshard for unit in lowered.record("recompute").program.units)
    assert [(unit.path, unit.plan.reshard, unit.plan.offload) for unit in lowered.record("zero").program.units] == [
        ("embed", True, False),
        ("layers.0", True, False),
        ("layers.1", True, False),
        ("head", True, False),
    ]


def test_the_units_that_a_pattern_names_are_offloaded() -> None:
    lowered = lower_gated_model(data=2, zero=3, offload="layers.*")
    assert [unit.plan.offload for unit in lowered.program.units] == [False, True, True, False]


def test_a_pattern_that_names_no_unit_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"offload: layer\.\* matches no unit of the model; the nearest is layers\.\d"):
        lower_gated_model(data=2, zero=3, offload="layer.*")
