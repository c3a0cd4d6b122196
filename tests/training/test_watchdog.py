"""Ranks that die, hang or are slow, in processes of their own: who is named, where the others waited, and that the job ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from shardcomp.training.stack_location import Place, is_communication, listed, oldest_pending
from shardcomp.training.verdict import Answer, MissingRank, verdict

RANKS = Path(__file__).with_name("watched_ranks.py")
LIMIT = 30.0  # seconds: the time-out, its grace, and a slow machine


def line_of(mark: str) -> str:
    [number] = [i for i, line in enumerate(RANKS.read_text().splitlines(), 1) if line.endswith(f"# here: {mark}")]
    return f"{RANKS.name}:{number}"


@dataclass(frozen=True)
class Ended:
    statuses: list[int]
    said: list[str]

    @property
    def whole(self) -> list[str]:
        """The lines of the message that is told once."""
        [told] = [text for text in self.said if "shardcomp: " in text and "tells more" not in text]
        return told[told.index("shardcomp: ") :].split("\nTraceback")[0].strip().splitlines()


Start = Callable[[str, int], Ended]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    root = RANKS.parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(RANKS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, bufsize=1
    )
    assert process.stdin is not None and process.stdout is not None

    def run(what: str, size: int) -> Ended:
        folder = tmp_path_factory.mktemp("ranks")
        print(json.dumps({"what": what, "size": size, "folder": str(folder), "limit": LIMIT}), file=process.stdin)
        found = json.loads(process.stdout.readline())
        assert found["seconds"] < LIMIT, [(folder / f"{rank}.txt").read_text() for rank in range(size)]
        return Ended(found["statuses"], [(folder / f"{rank}.txt").read_text() for rank in range(size)])

    yield run
    process.stdin.close()
    process.wait(10)


def test_a_killed_rank_is_named_and_the_collective_that_failed(start: Start) -> None:
    ended = start("killed", 3)
    assert ended.statuses == [1, -9, 1]
    first, others, *failed = ended.whole  # which may have failed in different ways on different ranks
    assert first.startswith("shardcomp: a collective failed; no answer from rank 1 on ")
    assert first.endswith("last known beat: step 2")
    assert others.startswith(
        f"  ranks 0 and 2 waiting in all_reduce over dp ({line_of('all_reduce')} in plain); last beat: step 2"
    )
    assert failed and all(line.startswith("  what failed on rank") for line in failed)
    assert "by peer" in " ".join(failed)
    assert "rank 2 ends as well; rank 0 tells more" in ended.said[2]


def test_a_stopped_rank_is_named_and_what_is_done_then_is_the_callers(start: Start) -> None:
    ended = start("stopped", 3)
    assert ended.statuses == [3, -9, 3]
    assert all(text.startswith("own act: shardcomp: ") for text in (ended.said[0], ended.said[2]))
    first, others = ended.whole
    assert first.startswith("shardcomp: no progress for 1.5 s; no answer from rank 1 on ")
    assert others.startswith("  ranks 0 and 2 waiting in all_reduce over dp")


def test_a_rank_that_sleeps_in_its_own_code_is_named_with_the_line(start: Start) -> None:
    ended = start("slow", 4)
    assert ended.statuses == [1, 1, 1, 1]
    first, others = ended.whole
    assert f"held up by rank 1 at {line_of('slow')} in slow, not in a collective; last beat: step 2" in first
    assert others.startswith(f"  ranks 0, 2 and 3 waiting in all_reduce over dp ({line_of('all_reduce')} in plain)")


def test_a_rank_that_waits_in_another_collective_is_named(start: Start) -> None:
    first, *others = start("elsewhere", 3).whole
    assert first.endswith("all wait, but rank 1 in another collective than the rest: their programs diverged")
    assert [line.partition(";")[0] for line in others] == [
        f"  ranks 0 and 2 waiting in all_reduce over dp ({line_of('all_reduce')} in plain)",
        f"  rank 1 waiting in recv from rank 0 ({line_of('elsewhere')} in plain)",
    ]


def test_a_rank_that_raised_is_named_with_its_exception(start: Start) -> None:
    ended = start("raises", 3)
    assert "rank 1 left: ValueError: bad batch" in ended.whole[0]
    assert "shardcomp" not in ended.said[1].partition("Traceback")[0]


def test_slow_steps_are_no_alarm_and_a_forked_child_can_be_ended(start: Start) -> None:
    ended = start("steady", 2)
    assert ended.statuses == [0, 0]
    assert ended.said == ["", ""]


@pytest.mark.parametrize("what", ["host", "host, unnoticed"])
def test_the_end_of_the_stores_host_is_told_by_each_rank(start: Start, what: str) -> None:
    ended = start(what, 3)
    assert ended.statuses == [-9, 1, 1]
    for rank in (1, 2):
        told = ended.said[rank]
        assert "does not answer, so the other ranks cannot be asked: the process that hosts it, rank 0 or" in told
        assert f"  rank {rank} waiting in {'all_reduce over dp' if what == 'host' else f'recv from rank {3 - rank}'} (" in told


def test_the_message_comes_out_though_the_launcher_ends_all_at_once(start: Start) -> None:
    # The others wait for one another: nothing but SIGTERM tells them.
    ended = start("launcher", 3)
    assert ended.statuses == [1, -9, 1]
    assert ended.whole[0].startswith("shardcomp: the job is being ended; no answer from rank 1")


def test_sigterm_ends_a_job_as_it_did_where_nobody_died(start: Start) -> None:
    ended = start("ended", 2)
    assert ended.statuses == [143, 143]
    assert ended.said == ["", ""]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("backward", "waiting in reduce_scatter over tp (backward of lm_head, {backward} in sharded)"),
        ("forward", "waiting in reduce_scatter over tp (model.embed_tokens, model.py:"),
        ("zero", "waiting in all_gather over dp (model.embed_tokens, FSDP, "),
        ("compared", "waiting in all_gather over tp (what ranks compare before a call, {forward} in sharded)"),
    ],
)
def test_of_a_sharded_model_the_axis_and_the_unit_are_told(start: Start, what: str, expected: str) -> None:
    ended = start(what, 2)
    first, other = ended.whole
    assert f"held up by rank 1 at {line_of('slow')} in slow" in first
    mark = "backward" if what == "backward" else "forward"
    assert other.startswith("  rank 0 " + expected.format(backward=line_of("backward"), forward=line_of("forward")))
    assert line_of(mark) in other


def waits(op: str, kind: str = "collective", beat: str = "step 3", failure: str = "") -> Answer:
    return Answer(Place(kind, op, "train.py:5"), beat, 7.0, failure, 4.0)


def test_ranks_of_whom_the_same_is_known_are_told_together() -> None:
    answers = {rank: waits("all_reduce over tp") for rank in range(8)}
    gone = {rank: MissingRank("node-2", "step 2", 4.0 if rank == 8 else None) for rank in range(8, 16)}
    first, others = verdict("no progress for 5 s", answers, gone).splitlines()
    assert first == (
        "shardcomp: no progress for 5 s; no answer from ranks 8-15 on node-2: died or is stopped; last sign of life 4 s ago, "
        "last known beat: step 2"
    )
    assert others == "  ranks 0-7 waiting in all_reduce over tp (train.py:5); last beat: step 3, 7 s ago"


def test_no_rank_is_blamed_where_all_wait_in_one_collective() -> None:
    told = verdict("no progress for 5 s", {rank: waits("barrier over all ranks") for rank in range(2)}, {})
    assert "all ranks answer, and wait in one collective" in told
    failed = verdict("a collective failed", {0: waits("barrier"), 1: waits("all_reduce", failure="no buffer space")}, {})
    assert failed.splitlines()[-1] == "  what failed on rank 1: no buffer space"


def test_ranks_that_wait_for_their_gpus_are_not_to_blame() -> None:
    answers = {0: waits("its GPU in loss.item()", "device"), 1: waits("", "code"), 2: waits("its GPU in loss.item()", "device")}
    first, others = verdict("no progress for 5 s", answers, {}).splitlines()
    assert "held up by rank 1 at train.py:5, not in a collective" in first
    assert others.startswith("  ranks 0 and 2 waiting for its GPU in loss.item() (train.py:5)")


def test_the_oldest_collective_that_has_not_ended_is_read_from_the_flight_recorder() -> None:
    def entry(op: str, state: str, group: str) -> dict[str, object]:
        return {"profiling_name": f"nccl:{op}", "state": state, "retired": state == "completed", "process_group": ["4", group]}

    entries = [entry("broadcast", "completed", "default_pg"), entry("all_gather", "started", "mesh_tp")]
    assert oldest_pending({"entries": [*entries, entry("barrier", "scheduled", "default_pg")]}) == ", after all_gather over tp"
    assert oldest_pending({"entries": entries[:1]}) == oldest_pending({}) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_of_communication_are_told_from_others(error: BaseException, expected: bool) -> None:
    assert is_communication(error) is expected


def test_numbers_are_listed_in_words() -> None:
    assert [listed(numbers) for numbers in ([3], [1, 0], [0, 1, 3], [0, 1, 2, 5])] == [
        "3",
        "0 and 1",
        "0, 1 and 3",
        "0-2 and 5",
    ]
