"""benchmarks/compare.py: what it takes, and how it writes what it measured. It runs no contender here."""

from __future__ import annotations

import compare
import pytest
from contenders import CONTENDERS

Capture = pytest.CaptureFixture[str]


def row(name: str, seconds: list[float], **entries: object) -> compare.Row:
    losses = [6.0, 5.0, 4.0]
    return compare.Row(name, "one rank", 1, steps=seconds, cpu=seconds, losses=losses, **entries)  # type: ignore[arg-type]


def test_quick_is_small_and_what_is_given_beside_it_counts() -> None:
    args = compare.parse(["--quick", "--hidden", "64"])
    assert (args.hidden, args.layers, args.rounds) == (64, compare.QUICK["layers"], compare.QUICK["rounds"])
    assert compare.parse([]).hidden == 512


def test_sequences_that_do_not_divide_are_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--sequences", "6", "--micro-batches", "1", "4"])
    assert "--sequences 6: use a multiple of 8, 2 ranks × micro-batches" in capsys.readouterr().err


def test_a_contender_that_does_not_exist_is_named_with_those_that_do(capsys: Capture) -> None:
    assert compare.main(["--only", "megatron"]) == 2
    said = capsys.readouterr().err
    assert "--only megatron: no contender is named so" in said and "tensor 2: DTensor TP" in said


def test_names_of_contenders_differ_and_each_topology_has_us() -> None:
    assert len({(contender.topology, contender.name) for contender in CONTENDERS}) == len(CONTENDERS)
    ours = {contender.topology for contender in CONTENDERS if contender.name.startswith("shardcomp")}
    assert ours == {contender.topology for contender in CONTENDERS}


def test_the_table_has_medians_and_why_a_row_is_missing() -> None:
    rows = [row("fast", [0.1, 0.2, 0.3, 0.2], live=2_000_000), row("absent", [], problem="it is not installed")]
    compare.deviations(rows, [6.0, 5.0, 5.0])
    head, _, fast, absent = compare.table(rows, 100).splitlines()
    assert head.count("|") == fast.count("|") == absent.count("|")
    assert fast.startswith("| fast | 500 (") and "| 0.200 |" in fast and "| 2 |" in fast and fast.endswith("| 2.0e-01 |")
    assert "it is not installed" in absent


def test_the_fastest_has_the_longest_bar() -> None:
    slow, fast = compare.chart([row("slow", [0.4]), row("fast", [0.1])], 100).splitlines()[::-1]
    assert fast.endswith(" 1,000") and fast.count("█") == 40 and slow.count("█") == 10
