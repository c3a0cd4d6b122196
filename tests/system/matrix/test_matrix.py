"""The matrix of releases: what it says about differences and failures, and that a model that fails stops no other."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from system.matrix import run
from system.matrix.comparison import differing_lines, differing_operators, failed, newest, notes, table
from system.matrix.environments import Pair, pinned, python_of
from system.matrix.one import _apart, _lowered

from shardcomp.errors import PolicyError
from shardcomp.policy import Policy
from shardcomp.policy.patterns import Entry, parse
from support.families import tiny_config


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
        "olmo3": captured(policy=None, unfit=['policies/olmo3.toml: line 3: "head" matches no module']),
        "mpt": {"error": "not done after 300 s"},
    },
}


def test_operators_are_counted_against_the_newest_release() -> None:
    assert differing_operators({"a": 3, "b": 1}, {"a": 1, "c": 2}) == "+2 a, +1 b, −2 c"
    assert differing_operators({"a": 1}, {"a": 1}) == ""


def test_lines_are_counted_against_the_newest_release() -> None:
    assert differing_lines("a\nx\ny\n", "a\nb\n") == "+2−1"
    assert differing_lines("a\n", "a\n") == ""


def test_an_error_and_a_deviation_fail_and_nothing_else_does() -> None:
    states = {pair: {model: failed(found) for model, found in models.items()} for pair, models in RESULTS.items()}
    assert states["4.53.3"] == {"llama": False, "bloom": True, "olmo3": False, "mpt": True}
    assert states["5.23.0"] == {"llama": False, "bloom": False, "olmo3": False, "mpt": True}


def test_a_model_that_the_newest_release_does_not_capture_is_compared_with_an_older() -> None:
    results = {**RESULTS, "5.23.0": {"llama": {"error": "none"}}}
    assert newest(results, "llama") is RESULTS["4.53.3"]["llama"]
    assert newest(results, "mpt") == {}


def test_the_table_has_a_line_for_every_model_and_a_column_for_every_release() -> None:
    lines = [line.split("  ") for line in table(RESULTS).splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["4.53.3", "5.23.0"]
    assert cells[2:6] == [
        ["llama", "2e-15 o +2−1", "2e-15"],
        ["bloom", "2e-15 FAILED sa", "2e-15 s"],
        ["olmo3", "–", "2e-15 dense"],
        ["mpt", "FAILED", "FAILED"],
    ]
    counts = "3 failed, 1 under a plan that splits nothing, 2 with static shapes only, 1 not in their release"
    assert cells[-1] == [f"4 of 7 passed, {counts}, 0 minutes"]


def test_the_notes_name_every_failure_and_every_difference() -> None:
    assert notes(RESULTS).split("\n\n") == [
        "Failed\n"
        "  4.53.3 bloom: gradients lm_head.weight is off by 5.0e-01, of 1e-09 allowed\n"
        "  4.53.3 mpt: CaptureError: no graph\n"
        "  5.23.0 mpt: not done after 300 s",
        'Policies that do not fit the release\n  olmo3 (5.23.0): policies/olmo3.toml: line 3: "head" matches no module',
        "Static shapes only: captured again for every shape\n  bloom (4.53.3, 5.23.0)",
        "Not as one attention operator, or not compared with the model\n  bloom (4.53.3): attention: its own",
        "Operators that the newest release does not have (+) or has more of (−)\n"
        "  llama (4.53.3): +1 aten.add.Tensor, −1 aten.mul.Tensor",
    ]


def test_the_release_that_make_installs_is_a_pinned_one() -> None:
    constraints = Path(__file__).parents[3].joinpath("constraints.txt").read_text().splitlines()
    assert {f"transformers=={version}" for version in pinned()} & set(constraints)


def test_what_is_here_needs_no_environment_of_its_own() -> None:
    assert python_of(Pair(version("transformers")), Path("none")) == Path(sys.executable)


def test_a_model_that_fails_or_hangs_is_a_result() -> None:
    assert _apart("no such kind", 60)["error"].startswith("ValueError: ")
    assert _apart("llama", 0.0) == {"error": "not done after 0 s"}


def test_a_model_is_lowered_under_the_policy_of_its_family() -> None:
    lowered, unfit = _lowered(tiny_config("llama"))
    assert (lowered.policy.name, lowered.policy.options.tensor, unfit) == ("llama", 2, [])


def test_where_no_policy_fits_the_model_is_compared_all_the_same_and_why_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> Policy:
        raise PolicyError(f"no policy {name}")

    monkeypatch.setattr(Policy, "for_model", lambda _: Policy("llama", (Entry(parse("zzz"), "vocab", 3),), source="mine"))
    monkeypatch.setattr(Policy, "load", none)
    lowered, unfit = _lowered(tiny_config("llama"))
    assert (lowered.policy.options.tensor, unfit) == (1, ['mine: line 3: "zzz" matches no module'])


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ({"4.53.3": {"llama": captured()}}, 0),
        ({"4.53.3": {"llama": captured(ok=False, worst=WORST)}}, 1),
        ({"4.53.3": "does not install here: no such release"}, 1),
        ({"5.23.0 with torch 2.11.0": "does not install here: too large"}, 0),
    ],
)
def test_a_failing_model_or_missing_release_is_an_error_a_missing_other_torch_is_not(
    outcomes: dict[str, Any],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "_outcome", lambda pair, *_: outcomes.get(str(pair), {"llama": captured()}))
    written = tmp_path / "results.json"
    asked = ["--models", "llama", "--versions", "5.23.0", "4.53.3", "--torch", "2.11.0", "--json", str(written)]
    assert run.main(asked) == status
    held = json.loads(written.read_text())
    assert list(held["results"] | held["untested"]).index("5.23.0") >= 2  # the newest comes last
    said = capsys.readouterr().out
    assert all(f"Not tested: {pair}: {why}" in said for pair, why in outcomes.items() if isinstance(why, str))


def test_a_kind_of_model_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--models", "lama"])
    assert "invalid choice: 'lama'" in capsys.readouterr().err
