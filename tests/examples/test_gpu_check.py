"""`make gpu` without a GPU: its dry run, its budget of time, its verdicts, its file of results; and verify on a device."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import benchmark
import check
import correctness
import parts
import shardcomp
from parts import Budget, Ended, Part
from shardcomp.verification import sharded_model
from shardcomp.verification.thread_ranks import run_alone

Capture = pytest.CaptureFixture[str]


def part(folder: Path, name: str, code: str, seconds: float = 30.0) -> Part:
    """A part that runs these lines, in which OUT is where it writes."""
    script = folder / f"{name}.py"
    script.write_text(f"OUT = {str(folder / name)!r} + '.jsonl'\n" + textwrap.dedent(code))
    return Part(name, (str(script),), seconds, folder / f"{name}.jsonl")


def ended(name: str, *found: Any, state: str = "done", why: str = "") -> Ended:
    return Ended(Part(name, (), 1.0, Path("nothing")), state, 1.0, why, list(found))


def test_a_dry_run_says_in_what_order_how_long_and_at_what_sizes(capsys: Capture, tmp_path: Path) -> None:
    assert check.main(["--dry-run", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"  {name} ") for name in check.SECONDS]
    assert places == sorted(places) and list(check.SECONDS)[:2] == ["build", "operators"]
    for text in (
        "nothing is measured",
        "nothing was measured",
        "at most 180 s",
        "8192 × 4096",
        "8192 × 11008",
        "8192 × 128256",
    ):
        assert text in out
    assert "cross_entropy 8192 × 32000" in out
    assert "up to 2.1 GB" in out  # 8192 × 128256 numbers of two bytes
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(capsys: Capture, tmp_path: Path) -> None:
    assert check.main(["--results", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "a GPU is needed" in err and "--dry-run" in err
    assert not list(tmp_path.iterdir())


def test_every_package_that_is_missing_is_named_in_one_message(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None if name in ("rich", "sympy") else object())
    assert check.main(["--dry-run"]) == 2
    assert "lacks sympy, rich" in capsys.readouterr().err


def test_parts_end_with_their_time_and_what_they_started_ends_with_them(tmp_path: Path) -> None:
    slow = part(
        tmp_path,
        "slow",
        """
        import subprocess, sys, time, parts, pathlib
        parts.write(pathlib.Path(OUT), {"before": 1})
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        parts.write(pathlib.Path(OUT), {"child": child.pid})
        with open(OUT, "a") as file:
            file.write('{"half')
        time.sleep(60)
        """,
        seconds=4.0,
    )
    began = time.monotonic()
    [found] = Budget(30.0, least=0.5).run([slow], lambda each: None)
    assert time.monotonic() - began < 20
    assert found.state == "cut off" and "4 s" in found.why
    assert [list(each) for each in found.found] == [["before"], ["child"]]
    stat = Path(f"/proc/{found.found[1]['child']}/stat")
    end = time.monotonic() + 10
    while (alive := stat.exists() and stat.read_text().split()[2] != "Z") and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive


def test_what_the_budget_does_not_reach_is_not_begun_and_said(tmp_path: Path) -> None:
    some = [part(tmp_path, "first", "import time; time.sleep(1.5)"), part(tmp_path, "second", "raise SystemExit(1)")]
    seen: list[str] = []
    found = Budget(1.7, least=1.0).run(some, lambda each: seen.append(f"{each.part.name} {each.state}"))
    assert seen == ["first done", "second not begun"]
    assert "used up" in found[1].why


def test_a_part_that_fails_tells_its_last_words(tmp_path: Path) -> None:
    [found] = Budget(30.0).run([part(tmp_path, "bad", "print('so it is'); raise ValueError('no')")], lambda each: None)
    assert found.state == "failed" and "so it is" in found.why and found.why.endswith("ValueError: no")


def test_a_part_imports_from_the_checkout(tmp_path: Path) -> None:
    [found] = Budget(30.0).run([part(tmp_path, "it", "import parts, shardcomp.errors, os; os.chdir('/')")], lambda each: None)
    assert found.state == "done", found.why


GOOD = {
    "build": [
        {"library": "jit", "why": "built now"},
        {"kernels": [{"name": "rms_norm", "device": "cuda:0", "ok": True, "runs": "jit library"}]},
    ],
    "operators": [{"operator": "rotary", "shape": "7b", "dtype": "bfloat16", "ok": True, "why": ""}],
    "verify": [{"ok": True, "reproduce": "shardcomp verify tiny"}],
    "kernels": [
        {"copy_bytes_per_second": 4e12},
        {"operator": "swiglu", "shape": "7b", "implementation": "shardcomp", "failed": ""},
        {"operator": "swiglu", "shape": "7b", "implementation": "Liger", "failed": "not installed"},
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_part_is_right_only_where_it_ended_and_all_it_found_is(name: str) -> None:
    assert check.judged([ended(name, *GOOD[name])])[0][1]
    assert not check.judged([ended(name, *GOOD[name], state="cut off", why="late")])[0][1]
    assert not check.judged([ended(name)])[0][1]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("build", {"library": "reference", "why": "no nvcc"}, "no nvcc"),
        (
            "operators",
            {"operator": "swiglu", "shape": "odd", "dtype": "float16", "ok": False, "why": "off"},
            "swiglu odd float16",
        ),
        ("verify", {"ok": False, "reproduce": "shardcomp verify tiny --device cuda"}, "--device cuda"),
        ("kernels", {"operator": "rotary", "shape": "7b", "implementation": "shardcomp", "failed": "bad"}, "rotary 7b: bad"),
    ],
)
def test_what_is_wrong_is_told(name: str, change: dict[str, Any], told: str) -> None:
    [(_, ok, text)] = check.judged([ended(name, change, *GOOD[name])])
    assert not ok and told in text


def test_the_file_of_results_is_named_by_date_and_device_and_numbered(tmp_path: Path) -> None:
    about = {"date": "2031-02-03 04:05", "device": "NVIDIA H200 (SXM)"}
    first = parts.result_file(tmp_path, "kernels", about)
    assert first.name == "2031-02-03-nvidia-h200-sxm-kernels.json"
    parts.save(first, {"a": 1})
    assert json.loads(first.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [first]
    assert parts.result_file(tmp_path, "kernels", about).name == "2031-02-03-nvidia-h200-sxm-kernels-2.json"


def test_results_say_what_they_were_measured_on() -> None:
    about = parts.about()
    assert {"device", "driver", "versions", "date", "commit", "memory"} <= about.keys()
    assert {"torch", "transformers", "python", "triton", "liger_kernel"} <= about["versions"].keys()


def test_a_run_on_a_gpu_writes_its_file_and_ends_with_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """The parts are stand-ins that write what parts on a GPU would."""
    row = {"operator": "swiglu", "shape": "7b", "implementation": "shardcomp", "failed": "", "forward": 1e-4, "backward": 2e-4}
    row |= {"forward_share": 0.81, "backward_share": 0.72}
    lines = {**GOOD, "kernels": [{"copy_bytes_per_second": 4e12}, row]}
    monkeypatch.setattr(parts, "need_gpu", lambda dry_run: None)
    monkeypatch.setattr(
        check,
        "planned",
        lambda folder: [
            part(folder, name, f"import parts, pathlib\nfor each in {lines[name]!r}: parts.write(pathlib.Path(OUT), each)")
            for name in lines
        ],
    )
    assert check.main(["--results", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [each["part"] for each in found["parts"]] == list(lines)
    assert {"device", "driver", "versions", "date", "commit"} <= found.keys()
    assert found["parts"][-1]["found"][1] == row
    table = capsys.readouterr().out.rpartition("forward / backward")[2]
    assert "100 / 200 (81% / 72%)" in table and "right" in table


def test_operators_are_compared_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    good = list(correctness.checks(device, ("tiny",)))
    assert all(each.ok for each in good), [each for each in good if not each.ok]
    assert {each.operator for each in good} >= {"rms_norm", "rotary", "swiglu", "linear_cross_entropy", "adamw", "grad_norm"}
    swiglu = correctness.kernels.swiglu
    monkeypatch.setattr(correctness.kernels, "swiglu", lambda gate, up, round_first: swiglu(gate, up, round_first=False))
    bad = {(each.operator, each.dtype) for each in correctness.checks(device, ("tiny",)) if not each.ok}
    assert bad == {("swiglu", "bfloat16"), ("swiglu", "float16")}


def test_outside_git_the_commit_is_what_one_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert parts.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert parts.commit() == "abc"


def test_a_time_on_a_gpu_is_that_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose events say 1, 2, 3 … ms: of what is handed over together each call has its own two, right around it."""
    order: list[str] = []
    took = iter(range(1, 1000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, other: Event) -> float:
            return float(next(took))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("all done"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    setting = benchmark.Setting(torch.device("cpu"), torch.float32, 1, 0.0)
    median, spread = benchmark.timed_on_gpu(lambda: order.append("call"), setting)
    assert median == pytest.approx(5.5e-3) and spread == pytest.approx(5.5e-3)  # of 1 … 10, the quartiles 2.75 and 8.25
    assert order == ["all done", "call"] * 2 + (["wait", "event", "call", "event"] * 5 + ["all done"]) * 2


def test_verify_runs_one_rank_under_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but on the CPU."""
    monkeypatch.setattr(sharded_model, "run_ranks", run_alone)
    found = shardcomp.verify("tiny", shardcomp.Policy.load("llama", precision="fp32"), 1, kinds=("causal",))
    assert found.ok and found.deviation["gradients"] < 1e-5
    assert not torch.distributed.is_initialized()


def test_verify_refuses_a_device_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = shardcomp.Policy.load("llama")
    with pytest.raises(shardcomp.VerifyError, match="use cpu or cuda"):
        shardcomp.verify("tiny", policy, 1, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(shardcomp.VerifyError, match="finds no GPU"):
        shardcomp.verify("tiny", policy, 1, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(shardcomp.VerifyError, match="one rank runs there, and the plan has 2"):
        shardcomp.verify("tiny", policy, 2, device="cuda")


def test_ranks_as_threads_compute_on_the_cpu_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardcomp.runtime import world
    from shardcomp.verification.thread_ranks import run_ranks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_ranks(2, lambda rank: str(world.device_of_rank())) == ["cpu", "cpu"]


def test_the_command_names_the_python() -> None:
    words = ["make", "--no-print-directory", "-n", "gpu", f"PYTHON={sys.executable}", "GPU=--dry-run"]
    done = subprocess.run(words, cwd=parts.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sys.executable} benchmarks/gpu/check.py --dry-run"
