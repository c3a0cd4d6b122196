"""What ends a run before its time, by real processes: signals, dead and stopped ranks, a second job, another plan."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from measure.kills import Job
from shardcomp.checkpoint import directory
from support.selection import LONG


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run", 2000, "--tensor 2", 2)


def trains(job: Job, steps: int = 3) -> None:
    already = max(job.numbers(), default=0)
    assert job.until(lambda: max(job.numbers(), default=0) >= already + steps), job.output()


def ended(job: Job, within: float) -> int:
    assert job.process is not None
    began = time.monotonic()
    try:
        return job.process.wait(within)
    finally:
        print(f"ended after {time.monotonic() - began:.0f} s\n{job.output()[-4000:]}")
        job.kill()


@pytest.mark.long  # training/test_watchdog.py kills ranks that cost less to start
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named(job: Job, victim: int) -> None:
    job.start()
    trains(job)
    os.kill(job.ranks_of()[victim], signal.SIGKILL)
    assert ended(job, 240) != 0
    if victim == 1:  # with rank 0 the line of the others may be cut off by the launcher, which names it as well
        assert "no answer from rank 1" in job.output() and "rank 0 " in job.output()
    assert f"rank      : {victim} (local_rank: {victim})\n  exitcode  : -9" in job.output()


@pytest.mark.skipif(not LONG, reason="the launcher takes half a minute to end a stopped rank: make long")
def test_a_rank_that_is_stopped_ends_the_run_within_the_time_out(job: Job) -> None:
    job.start("--timeout", "3")
    trains(job)
    os.kill(job.ranks_of()[1], signal.SIGSTOP)
    assert ended(job, 90) != 0
    assert "no progress for 3 s; no answer from rank 1" in job.output()
    assert re.search(r"rank 0 waiting in \w+ over", job.output())


@pytest.mark.long  # checkpoint/test_directory.py has two jobs that cost less to start
def test_a_second_run_in_the_same_folder_is_refused(job: Job) -> None:
    job.start("--save-interval", "1000", "--patience", "0")
    trains(job)
    second = Job(job.folder, 2000, "--tensor 2", 2)
    second.start("--patience", "0", "--log-file", str(job.folder / "second.jsonl"))
    assert ended(second, 240) != 0
    assert "is in use by process" in job.output()


def test_a_signal_to_any_rank_saves_and_another_plan_goes_on(job: Job) -> None:
    job.start("--save-interval", "1000", "--patience", "0")
    trains(job)
    os.kill(job.ranks_of()[1], signal.SIGUSR1)
    assert ended(job, 240) == 0
    [(step, path)] = directory.checkpoints(job.checkpoints)
    assert f"ended by a signal to stop after step {step}" in job.output() and step == max(job.numbers())

    other = Job(job.folder, step + 2, "--data 2 --zero 3", 2)
    other.start("-b", "2")
    other.wait()
    assert f"resuming from step {step}: {path}; another mesh" in job.output()
    assert max(job.numbers()) == step + 2
