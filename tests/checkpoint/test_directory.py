"""Checkpoints on the disk: published whole, deleted whole, cleared up after a kill, one job to a directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardcomp import CheckpointError
from shardcomp.checkpoint import directory


def made(root: Path, *steps: int) -> list[Path]:
    paths = [root / directory.name_of(step) for step in steps]
    for path in paths:
        path.mkdir()
        (path / "content").write_text(path.name)
    return paths


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_said(tmp_path: Path) -> None:
    import os

    made(tmp_path, 9, 100000000, 20)
    os.utime(tmp_path / directory.name_of(9), (2**32, 2**32))
    (tmp_path / ".step-00000030.partial").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-00000040").write_text("a file")
    assert [step for step, _ in directory.checkpoints(tmp_path)] == [9, 20, 100000000]
    assert directory.latest(tmp_path) == tmp_path / "step-100000000"
    assert directory.latest(tmp_path / "nothing") is None


def test_the_last_k_and_every_mth_are_kept(tmp_path: Path) -> None:
    made(tmp_path, *range(10, 110, 10))
    directory.prune(tmp_path, None, None)
    assert len(names(tmp_path)) == 10
    directory.prune(tmp_path, keep=2, keep_every=40)
    assert [step for step, _ in directory.checkpoints(tmp_path)] == [40, 80, 90, 100]
    directory.prune(tmp_path, keep=1, keep_every=None)
    assert names(tmp_path) == ["step-00000100"]


def test_checkpoints_of_other_names_are_found_and_never_deleted(tmp_path: Path) -> None:
    made(tmp_path, 5, 6)
    for name, step in (("mine", 9), ("damaged-step-00000008", 8), ("superseded-step-00000010", 10), (".hidden", 11)):
        (tmp_path / name).mkdir()
        (tmp_path / name / directory.MANIFEST).write_text(f'{{"step": {step}}}')
    (tmp_path / "other").mkdir()
    assert [(step, path.name) for step, path in directory.checkpoints(tmp_path)] == [
        (5, "step-00000005"),
        (6, "step-00000006"),
        (9, "mine"),
    ]
    directory.prune(tmp_path, keep=1, keep_every=None)
    assert [step for step, _ in directory.checkpoints(tmp_path)] == [6, 9]


def test_nothing_but_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "empty").mkdir()
    directory.refuse_others(tmp_path / "empty")
    directory.refuse_others(tmp_path / "new")
    for path, said in ((tmp_path, "holds something else"), (tmp_path / "thesis.tex", "is not a directory")):
        with pytest.raises(CheckpointError, match=said):
            directory.refuse_others(path)


def test_a_checkpoint_takes_its_place_whole_and_replaces_one(tmp_path: Path) -> None:
    [path] = made(tmp_path, 1)
    new = directory.partial(path)
    new.mkdir()
    (new / "content").write_text("new")
    directory.publish(path)
    assert names(tmp_path) == [path.name] and (path / "content").read_text() == "new"


def test_one_of_any_name_that_a_kill_hid_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".mine.previous").mkdir()
    directory.put_back(tmp_path / "mine")
    directory.put_back(tmp_path / "other")
    assert names(tmp_path) == ["mine"]


def test_what_a_kill_left_is_cleared_away_and_what_it_hid_comes_back(tmp_path: Path) -> None:
    made(tmp_path, 1)
    for name in (".step-00000002.partial", ".step-00000003.previous", ".step-00000004.removed", ".step-00000001.previous"):
        (tmp_path / name).mkdir()
    (tmp_path / ".notes").write_text("somebody's")
    assert len(directory.recover(tmp_path)) == 4
    assert names(tmp_path) == [".notes", "step-00000001", "step-00000003"]


def test_a_checkpoint_set_aside_is_nobodys_newest_and_none_is_lost(tmp_path: Path) -> None:
    for _ in range(2):
        [path] = made(tmp_path, 7)
        directory.set_aside(path, "damaged")
    assert names(tmp_path) == ["damaged-step-00000007", "damaged-step-00000007.1"]
    assert directory.latest(tmp_path) is None


def test_a_second_job_is_told_who_has_the_directory_until_that_one_is_killed(tmp_path: Path) -> None:
    code = f"from shardcomp.checkpoint.directory import Lock; from pathlib import Path; lock = Lock(Path({str(tmp_path)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('locked', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        lines: list[str] = []
        with pytest.raises(CheckpointError, match=f"in use by process {other.pid} on "):
            directory.Lock(tmp_path, patience=0.3, say=lines.append)
        assert len(lines) == 1 and str(other.pid) in lines[0]
        other.kill()
        other.wait()
        directory.Lock(tmp_path, patience=5).release()
    directory.Lock(tmp_path).release()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run cannot be written to"):
        directory.Lock(tmp_path / "file" / "run")
