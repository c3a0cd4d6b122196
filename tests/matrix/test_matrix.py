"""The matrix of releases: what it says about differences and failures, and that a model that fails stops no other."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matrix.comparison import differing_lines, differing_operators, failed, newest, notes, table
from matrix.environments import Pair, pinned, python_of
from matrix.one import _apart


def captured(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"capture": "dynamic", "degraded": [], "operators": {"aten.mul.Tensor": 2, "attention": 1}}
    found |= {"listing": "a = 1\nb = 2\n", "ok": True, "deviation": 2e-15, "worst": {}, "seconds": 3.2}
    return found | changes


WORST = {"quantity": "gradients", "parameter": "lm_head.weight", "value": 0.5, "tolerance": 1e-9}
RESULTS = {
    "4.53.3": {
        "llama": captured(operators={"aten.mul.Tensor": 1, "aten.add.Tensor": 1, "attention": 1}, listing="a = 1\nb = 3\nc\n"),
        "bloom": captured(capture="static", degraded=["shape: for (3, 18) alone", "attention: its own"], ok=False, worst=WORST),
        "olmo3": {"absent": True},
        "mpt": {"error": "CaptureError: no graph"},
    },
    "5.23.0": {
        "llama": captured(),
        "bloom": captured(capture="static", degraded=["shape: for (3, 18) alone"]),
        "olmo3": {key: held for key, held in captured(unverified="no policy").items() if key not in ("ok", "listing")},
        "mpt": {"error": "not done after 300 s"},
    },
}


def test_operators_are_counted_against_the_newest_release() -> None:
    assert differing_operators({"a": 3, "b": 1}, {"a": 1, "c": 2}) == "+2 a, +1 b, −2 c"
    assert differing_operators({"a": 1}, {"a": 1}) == ""


def test_lines_are_counted_against_the_newest_release() -> None:
    assert differing_lines("a\nx\ny\n", "a\nb\n") == "+2 −1"
    assert differing_lines("a\n", "a\n") == ""


def test_an_error_and_a_deviation_fail_and_nothing_else_does() -> None:
    states = {pair: {model: failed(found) for model, found in models.items()} for pair, models in RESULTS.items()}
    assert states["4.53.3"] == {"llama": False, "bloom": True, "olmo3": False, "mpt": True}
    assert states["5.23.0"] == {"llama": False, "bloom": False, "olmo3": False, "mpt": True}


def test_a_model_that_the_newest_release_does_not_capture_is_compared_with_the_newest_that_does() -> None:
    results = {**RESULTS, "5.23.0": {"llama": {"error": "none"}}}
    assert newest(results, "llama") is RESULTS["4.53.3"]["llama"]
    assert newest(results, "mpt") == {}


def test_the_table_has_a_line_for_every_model_and_release() -> None:
    lines = [" ".join(line.split()) for line in table(RESULTS).splitlines()[2:]]
    assert lines == [
        "4.53.3 llama dynamic 2.0e-15 differ +2 −1 3",
        "5.23.0 llama dynamic 2.0e-15 newest newest 3",
        "4.53.3 bloom static, degraded 2.0e-15 FAILED same same 3",
        "5.23.0 bloom static 2.0e-15 newest newest 3",
        "4.53.3 olmo3 not in this release 0",
        "5.23.0 olmo3 dynamic no policy newest none 3",
        "4.53.3 mpt FAILED 0",
        "5.23.0 mpt FAILED 0",
    ]


def test_the_notes_name_every_failure_and_every_difference() -> None:
    assert notes(RESULTS).split("\n\n") == [
        "Failed\n"
        "  4.53.3 bloom: gradients lm_head.weight is off by 5.0e-01, of 1e-09 allowed\n"
        "  4.53.3 mpt: CaptureError: no graph\n"
        "  5.23.0 mpt: not done after 300 s",
        "Static shapes only: captured again for every shape\n  bloom (4.53.3, 5.23.0)",
        "Not as one attention operator, or not compared with the model\n  bloom (4.53.3): attention: its own",
        "Operators that the newest release does not have (+) or has more of (−)\n"
        "  llama (4.53.3): +1 aten.add.Tensor, −1 aten.mul.Tensor",
    ]


def test_the_newest_pinned_release_is_the_one_that_make_installs() -> None:
    constraints = Path(__file__).parents[2].joinpath("constraints.txt").read_text().splitlines()
    assert f"transformers=={pinned()[-1]}" in constraints


def test_what_is_here_needs_no_environment_of_its_own() -> None:
    assert python_of(Pair(version("transformers")), Path("none")) == Path(sys.executable)


def test_a_model_that_fails_or_hangs_is_a_result() -> None:
    assert _apart("no such kind", 60)["error"].startswith("ValueError: ")
    assert _apart("llama", 0.0) == {"error": "not done after 0 s"}
