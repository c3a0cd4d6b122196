"""The driver's checkpoints, on one rank: when they are made and kept, what a run goes on from, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.test_pretrain import TEXT, nothing_starts, refused, write_config  # noqa: F401
from transformers import AutoModelForCausalLM

import pretrain
from interruptions import Interruptions, Interval
from shardcomp.checkpoint import directory

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_bytes(TEXT)
    words = ["-c", write_config(tmp_path), "-d", tmp_path / "text.txt", "-l", 32, "-b", 4, "--precision", "fp32"]
    return [str(word) for word in [*words, "--warmup", 2, "--lr", 1e-2]]


def ran(capsys: Capture, command: list[str], *more: object) -> str:
    assert pretrain.main([*command, *map(str, more)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def steps(log: Path) -> dict[int, tuple[Any, ...]]:
    entries = [json.loads(line) for line in log.read_text().splitlines() if line]
    return {each["step"]: (each["loss"], each["norm"], each["digest"], each["lr"]) for each in entries if "loss" in each}


def test_a_run_in_two_parts_is_one_run(capsys: Capture, command: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    ran(capsys, command, "--steps", 1)  # what a first run in a process imports may draw from Python's generator
    ran(capsys, command, "--steps", 9, "--log-file", whole, "--checkpoint-dir", tmp_path / "a", "--save-interval", 9)
    run = ["--steps", 9, "--checkpoint-dir", tmp_path / "b", "--save-interval", 2, "--keep", 2, "--keep-every", 4]
    ran(capsys, command, *run, "--log-file", parts, "--time-limit", 1e-9)  # ends after one step
    said = ran(capsys, command, *run, "--log-file", parts)
    assert "resuming from step 1" in said
    assert steps(parts) == steps(whole)
    assert [step for step, _ in directory.checkpoints(tmp_path / "b")] == [4, 8, 9]
    sums = [directory.read_sums(tmp_path / run / directory.name_of(9)) for run in "ab"]
    assert sums[0] == sums[1]
    assert "nothing is left to train" in ran(capsys, command, *run)


def test_a_checkpoint_that_is_named_is_gone_on_from_and_later_ones_are_set_aside(
    capsys: Capture, command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = ["--checkpoint-dir", folder, "--save-interval", 2, "--keep", 9]
    ran(capsys, command, "--steps", 6, *run)
    said = ran(capsys, command, "--steps", 8, *run, "--resume", folder / directory.name_of(2))
    assert "resuming from step 2" in said and "superseded-step-00000006" in said
    assert [step for step, _ in directory.checkpoints(folder)] == [2, 4, 6, 8]
    shutil.move(folder / directory.name_of(4), tmp_path / "elsewhere")
    assert "resuming from step 4" in ran(capsys, command, "--steps", 5, "--resume", tmp_path / "elsewhere")


def test_a_damaged_checkpoint_is_passed_over(capsys: Capture, command: list[str], tmp_path: Path) -> None:
    run = ["--checkpoint-dir", tmp_path / "run", "--save-interval", 2]
    ran(capsys, command, "--steps", 4, *run)
    path = tmp_path / "run" / directory.name_of(4) / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1
    path.write_bytes(content)
    said = ran(capsys, command, "--steps", 5, *run)
    assert f"{path} is damaged" in said and "resuming from step 2" in said and "damaged-step-00000004" in said


def test_each_checkpoint_is_also_a_huggingface_directory(capsys: Capture, command: list[str], tmp_path: Path) -> None:
    run = ["--checkpoint-dir", tmp_path / "run", "--save-interval", 2, "--keep", 1, "--export-hf"]
    ran(capsys, command, "--steps", 4, *run, "-o", tmp_path / "saved")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/huggingface" / directory.name_of(4)).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], held) for name, held in saved.items())
    assert [path.name for path in (tmp_path / "run/huggingface").iterdir()] == [directory.name_of(4)]


@pytest.mark.long  # training/test_sample_stream.py refuses other samples
def test_other_text_is_refused_and_nothing_is_lost(capsys: Capture, command: list[str], tmp_path: Path) -> None:
    run = ["--checkpoint-dir", tmp_path / "run", "--save-interval", 2]
    ran(capsys, command, "--steps", 2, *run)
    (tmp_path / "text.txt").write_bytes(TEXT.replace(b"beer", b"milk"))
    assert pretrain.main([*command, "--steps", "4", *map(str, run)]) == 2
    assert "the run had other samples" in capsys.readouterr().err
    assert [step for step, _ in directory.checkpoints(tmp_path / "run")] == [2]


def test_losses_that_are_not_finite_end_a_run_after_so_many(capsys: Capture, command: list[str], tmp_path: Path) -> None:
    run = ["--checkpoint-dir", tmp_path / "run", "--save-interval", 1, "--bad-steps", 3]
    command = [*command[:-1], "1e30"]
    assert pretrain.main([*command, "--warmup", "0", "--steps", "20", *map(str, run)]) == 1
    said = capsys.readouterr()
    assert "3 of the last" in said.err and "not finite" in said.err and "nothing was changed" in said.out


def test_a_save_that_fails_does_not_end_the_run_but_its_status(
    capsys: Capture, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "sync", full)
    run = ["--checkpoint-dir", tmp_path / "run", "--save-interval", 2]
    assert pretrain.main([*command, "--steps", "5", *map(str, run)]) == 1
    said = capsys.readouterr()
    assert said.out.count("NOT SAVED") == 2 and "No space left on device" in said.out and "step 5/5" in said.out
    assert "the last checkpoint failed" in said.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.usefixtures("nothing_starts")
class TestBadInput:
    @pytest.mark.parametrize(
        "flag", [("--save-interval", "5"), ("--keep", "2"), ("--keep-every", "2"), ("--export-hf",), ("--patience", "1")]
    )
    def test_flags_about_checkpoints_need_a_directory(self, capsys: Capture, flag: tuple[str, ...]) -> None:
        said = refused(capsys, *flag)
        assert flag[0] in said and "--checkpoint-dir" in said

    @pytest.mark.parametrize("interval", ["0", "-1", "m", "1.5", "nan", "infm", "10s"])
    def test_an_interval_is_steps_or_minutes(self, capsys: Capture, interval: str) -> None:
        assert "--save-interval" in refused(capsys, f"--save-interval={interval}")

    def test_what_is_no_checkpoint_is_not_gone_on_from(self, capsys: Capture, tmp_path: Path) -> None:
        assert "no such directory" in refused(capsys, "--resume", tmp_path / "nothing")
        assert "holds no checkpoint" in refused(capsys, "--resume", tmp_path)

    def test_a_run_is_not_begun_over_another(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / directory.name_of(3)).mkdir()
        said = refused(capsys, "--resume", "never", "--checkpoint-dir", tmp_path)
        assert "step-00000003 exists" in said

    def test_a_log_that_is_a_directory(self, capsys: Capture, tmp_path: Path) -> None:
        assert "is a directory" in refused(capsys, "--log-file", tmp_path)


def test_intervals_of_minutes_follow_a_clock_that_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    assert Interval.parse("200") == Interval(steps=200) and Interval.parse("1.5m") == Interval(minutes=1.5)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 0.0)  # nobody looks at it
    first, other = (Interruptions(Interval.parse("1m"), None, first) for first in (True, False))
    asked = []
    for now[0] in range(1000, 1200, 10):
        asked.append(first.asked(1)[2])
        assert other.asked(1) == (0, 0, 0)
    assert [i for i, due in enumerate(asked) if due] == [6, 12, 18]
