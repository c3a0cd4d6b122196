"""`resume_check`: what it finds of a run that is killed, that it can say no, and what it refuses before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardcomp
from shardcomp import VerifyError, cli
from shardcomp.checkpoint import directory
from shardcomp.verification import resumption
from shardcomp.verification.resumption import resume_check


@pytest.mark.parametrize(
    ("plan", "world", "onto_plan"),
    [
        ([], 1, "--data 2 --zero 3"),
        pytest.param(["--tensor", "2"], 2, "--tensor 1 --data 2 --zero 3", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_with_the_same_bits_and_another_topology_agrees(
    plan: list[str], world: int, onto_plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tiny", *plan, "--precision", "fp64", "--steps", "5", "--onto", onto_plan]
    assert cli.main(["resume-check", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["losses_equal"] and found["files_equal"]
    assert 0 < found["resumed_from"] <= found["killed_after"] < 5
    onto = found["onto"]
    assert onto["ok"] and onto["batches_equal"] and onto["from_step"] == 2
    assert onto["losses"] <= onto["tolerance"] == 1e-9 and onto["weights"] <= 1e-9
    assert found["reproduce"].startswith(f"shardcomp resume-check tiny --world {world} ")


class Ranks:
    """A run as it might have left its files."""

    def __init__(self, numbers: dict[int, tuple[float, float, str]], start: int) -> None:
        self._numbers, self._start = numbers, start

    def numbers(self) -> dict[int, tuple[float, float, str]]:
        return self._numbers

    def resumed_from(self) -> int:
        return self._start


@pytest.mark.parametrize(
    ("loss", "batch", "ok"), [(2.0, "b", True), (2.0 + 1e-6, "b", True), (2.0 + 1e-4, "b", False), (2.0, "x", False)]
)
def test_another_topology_is_judged_by_its_losses_and_batches(loss: float, batch: str, ok: bool) -> None:
    policy = shardcomp.Policy.load("llama", precision="fp32")
    exact = Ranks({1: (3.0, 1.0, "a"), 2: (2.0, 1.0, "b")}, 0)
    found: Any = resumption._compare(exact, Ranks({2: (loss, 1.0, batch)}, 1), policy)  # type: ignore[arg-type]
    assert found["ok"] is ok and found["from_step"] == 1


@pytest.mark.parametrize(
    ("options", "more", "said"),
    [
        ({"precision": "bf16"}, {"onto": {"precision": "bf16"}}, "fp64 and fp32"),
        ({"precision": "fp64"}, {"onto": {"precision": "fp32"}}, "fp64, and fp32 for the other topology"),
        ({"tensor": 2}, {"world_size": 16}, "16 ranks: resume-check starts at most 8"),
        ({}, {"steps": 3}, "steps = 3: give 4 or more"),
    ],
)
def test_what_cannot_be_told_is_refused_first(
    options: dict[str, Any], more: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "_Ranks", None)
    onto = more.pop("onto", None)
    with pytest.raises(VerifyError, match=said):
        resume_check(
            "tiny",
            shardcomp.Policy.load("llama", **options),
            **more,
            onto=shardcomp.Policy.load("llama", **onto) if onto else None,
        )


def test_a_plan_that_is_not_legal_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "_Ranks", None)
    with pytest.raises(shardcomp.ShardError, match="tensor = 3"):
        resume_check("tiny", shardcomp.Policy.load("llama", tensor=3))


def test_convert_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / directory.SUMS} is missing" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
