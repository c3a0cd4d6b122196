"""The source that runs: for each stage a file, which is its listing."""

from __future__ import annotations

from support.listings import before_and_after, class_listing, lower_gated_model


def test_the_source_that_runs_is_the_listing() -> None:
    lowered = lower_gated_model()
    before, after = before_and_after(lowered, "emit", "Layer")
    assert before == after != ""
    assert lowered.record("zero").program.source == {}
    [source] = lowered.program.source.values()
    assert source == lowered.listing()
    compile(source, "emitted", "exec")


def test_each_stage_is_a_file_with_its_units_alone() -> None:
    lowered = lower_gated_model(pipeline=2)
    first, second = lowered.program.source.values()
    assert class_listing(first, "First") and not class_listing(first, "Last")
    assert class_listing(second, "Last") and not class_listing(second, "First")
    assert (first, second) == (lowered.listing(rank=0), lowered.listing(rank=1))
