"""The command line: what each command prints where, and its exit status."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shardcomp
from shardcomp import cli
from shardcomp.errors import InternalError
from shardcomp.kernels.attention_providers import PROVIDERS
from shardcomp.kernels.counts import NAMES

PLAN = ["tiny", "--tensor", "2", "--seq", "32"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("words", [("--help",), ("inspect", "--help"), ("verify", "--help"), ("env", "--help"), ("--version",)])
def test_help_is_there_without_importing_anything_heavy(words: tuple[str, ...]) -> None:
    code = f"import sys; from shardcomp import cli\ntry: cli.main({words!r})\nexcept SystemExit as e: assert e.code == 0"
    code += "\nassert not {'torch', 'transformers', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_every_option_of_a_policy_is_a_flag_of_every_command_that_plans(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        _, text, _ = run(capsys, command, "--help")
        for flag in ("--tensor", "--data", "--sequence-parallel", "--micro-batch", "--precision", "--seed"):
            assert flag in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "COMMAND"),
        (("plan", "tiny"), "invalid choice: 'plan'"),
        (("inspect",), "MODEL"),
        (("inspect", "tiny", "--tens", "2"), "unrecognized arguments: --tens"),
        (("inspect", "tiny", "--context", "1"), "unrecognized arguments: --context"),
        (("inspect", "tiny", "--world", "0"), "'0' is not a whole number, 1 or more"),
        (("inspect", "tiny", "--seq", "long"), "'long' is not a whole number"),
        (("inspect", "tiny", "--after", "tensor"), "give it with --listing"),
        (("inspect", "tiny", "--listing", "--diff", "tensor"), "give one of them"),
        (("verify", "tiny", "--shrink", "num_hidden_layers"), "write KEY=VALUE"),
        (("verify", "tiny", "--shrink", "none", "--shrink", "a=1"), "give it alone"),
        (("verify", "tiny", "--seq", "32"), "unrecognized arguments: --seq"),
        (("inspect", "tiny", "--precision", "fp8", "--tensor", "x"), "2 violations"),
        (("inspect", "tiny", "--policy", "llame"), "did you mean 'llama'?"),
        (("inspect", "no-such-model"), "no-such-model"),
        (("inspect", "tiny", "--tensor", "2", "--world", "3"), "does not divide a world of 3 ranks"),
        (("inspect", "tiny", "--data", "2", "--world", "3"), "make 2 ranks, but the world has 3"),
        (("inspect", "tiny", "--tensor", "2", "--seq", "33"), "33"),
        (("inspect", "tiny", "--global-batch", "3", "--data", "2"), "3"),
        (("inspect", "tiny", "--rank", "1"), "rank 1"),
        (("inspect", "tiny", "--listing", "--after", "tensr"), "tensr"),
        (("inspect", "tiny", "--diff", "tensr"), "tensr"),
        (("inspect", "tiny", "--listing", "--rank", "-1"), "rank -1"),
        (("inspect", "tiny", "--diff", "tensor", "--rank", "1"), "rank 1"),
    ],
)
def test_bad_input_is_refused_with_status_2_and_nothing_on_stdout(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert said in err and "Traceback" not in err


def test_inspect_prints_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", *PLAN)
    assert status == 0
    assert "mesh      pp 1 · dp 1 · cp 1 · tp 2" in out and "all_gather" in out


def test_inspect_json_is_one_object_with_the_keys_of_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", *PLAN, "--data", "2", "--micro-batch", "2", "--global-batch", "8", "--json")
    found = json.loads(out)
    assert status == 0
    keys = {
        "model",
        "mesh",
        "policy",
        "step",
        "stages",
        "flops",
        "collectives",
        "memory",
        "kernels",
        "missed",
        "degraded",
        "split",
        "replicated",
        "units",
    }
    assert set(found) == keys
    assert found["mesh"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    assert found["step"] == {"seq": 32, "micro_batch": 2, "global_batch": 8}
    assert set(found["collectives"][0]) == {"op", "axis", "phase", "count", "bytes", "where"}


def test_a_world_without_data_leaves_data_parallelism_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "inspect", *PLAN, "--world", "8", "--json")
    assert json.loads(out)["mesh"]["dp"] == 4


def test_the_listing_is_python_and_can_be_had_after_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    status, last, _ = run(capsys, "inspect", *PLAN, "--listing")
    assert status == 0 and "allgather_reducescatter" in last
    ast.parse(last)
    _, captured, _ = run(capsys, "inspect", *PLAN, "--listing", "--after", "capture")
    assert "allgather_reducescatter" not in captured
    ast.parse(captured)


def test_a_diff_shows_what_a_pass_changed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", *PLAN, "--diff", "tensor_parallel")
    assert status == 0
    assert out.startswith("--- fuse_kernels\n+++ tensor_parallel\n")
    assert any(line.startswith("+") and "reducescatter_allgather" in line for line in out.splitlines())


def test_listing_and_diff_are_keys_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, listing, _ = run(capsys, "inspect", *PLAN, "--listing")
    _, out, _ = run(capsys, "inspect", *PLAN, "--listing", "--json")
    assert json.loads(out)["listing"] == listing and "memory" in json.loads(out)


def test_the_policy_file_decides_where_no_flag_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    shutil.copy(Path(__file__).parents[1] / "policies" / "llama.toml", file)
    file.write_text(file.read_text() + "tensor = 2\n")
    _, out, _ = run(capsys, "inspect", "tiny", "--policy", str(file), "--seq", "32", "--json")
    assert json.loads(out)["mesh"]["tp"] == 2
    _, out, _ = run(capsys, "inspect", "tiny", "--policy", str(file), "--tensor", "1", "--seq", "32", "--json")
    assert json.loads(out)["mesh"]["tp"] == 1


def test_verify_says_yes_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "verify", "tiny", "--tensor", "2", "--precision", "fp64", "--json")
    found = json.loads(out)
    assert status == 0 and found["ok"] is True
    assert set(found) == {"ok", "precision", "deviation", "worst", "reproduce", "batches"}
    assert {"loss", "gradients", "weights"} <= set(found["deviation"])
    assert "shardcomp: " in err
    assert found["reproduce"].startswith("shardcomp verify tiny ")


def test_what_verify_says_reproduces_can_be_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shardcomp.verification import verifier

    words = [
        "tiny",
        "--tensor",
        "2",
        "--precision",
        "fp32",
        "--shrink",
        "num_hidden_layers=2",
        "--seed",
        "3",
        "--device",
        "cuda",
    ]
    calls: list[dict[str, Any]] = []

    def recorded(model: Any, policy: Any, **rest: Any) -> Any:
        calls.append({"model": model, "options": policy.options, "shrink": rest["shrink"], "device": rest["device"]})
        world = policy.mesh(rest["world_size"] or 2).world_size
        again = verifier._command(model, policy, world, rest["shrink"], rest["device"])
        return verifier.Verification(True, "fp32", {}, {}, again)

    monkeypatch.setattr(verifier, "verify", recorded)
    _, out, _ = run(capsys, "verify", *words, "--json")
    command = json.loads(out)["reproduce"].split()
    assert command[0] == "shardcomp"
    run(capsys, *command[1:])
    assert calls[0] == calls[1]
    assert calls[0]["shrink"] == {"num_hidden_layers": 2} and calls[0]["options"].seed == 3


def answer(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Have `verify` answer this."""
    from shardcomp.verification import verifier

    found = {"ok": True, "precision": "fp64", "deviation": {}, "worst": {}, "reproduce": "shardcomp verify tiny", **fields}
    monkeypatch.setattr(verifier, "verify", lambda *args, **kwargs: verifier.Verification(**found))


WORST = {"quantity": "gradients", "parameter": "lm_head.weight", "value": float("inf"), "tolerance": 1e-9}


def test_verify_says_no_with_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ok=False, deviation={"loss": 1e-16, "gradients": float("inf")}, worst=WORST)
    status, out, _ = run(capsys, "verify", "tiny")
    assert status == 1
    assert "does NOT agree" in out and "lm_head.weight" in out and "reproduce with: shardcomp verify tiny" in out
    status, out, _ = run(capsys, "verify", "tiny", "--json")
    assert status == 1 and json.loads(out)["deviation"]["gradients"] == "inf"


def test_faults_that_nobody_noticed_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ok=False, mutants={"total": 3, "killed": 2, "survivors": ["layer 0: not sent"]})
    status, out, _ = run(capsys, "verify", "tiny", "--mutate")
    assert status == 1
    assert "mutants noticed: 2 of 3" in out and "not noticed: layer 0: not sent" in out
    _, out, _ = run(capsys, "verify", "tiny", "--mutate", "--json")
    assert json.loads(out)["mutants"]["survivors"] == ["layer 0: not sent"]


def test_verify_says_which_ranks_disagree_about_what_and_prints_the_deviations(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(ranks: list[int], deviation: float, stage: int | None = None) -> dict[str, Any]:
        return {"ranks": ranks, "stage": stage, "deviation": deviation}

    norm = {"quantity": "gradients", "parameter": "model.norm.weight", "batch": "causal", "apart": 0.5}
    norm["copies"] = [copy([0, 1], 1e-16), copy([2], 0.5)]
    tied = {"quantity": "weights", "parameter": "lm_head.weight", "batch": "", "apart": 0.25}
    tied["copies"] = [copy([1], 1e-16, 1), copy([1], 0.25, 2)]
    answer(monkeypatch, ok=False, deviation={"gradients": 0.5}, worst=WORST, disagreements=[norm, tied, *[norm] * 5])
    status, out, _ = run(capsys, "verify", "tiny")
    assert status == 1
    assert out.startswith(
        """in fp64, the plan does NOT agree with the dense model
the ranks disagree with each other about 7 values:
  gradients of model.norm.weight, causal batch: 5.00e-01 apart
    ranks 0, 1: 1.00e-16 from the dense model
    rank 2: 5.00e-01 from the dense model
  weights of lm_head.weight: 2.50e-01 apart
    rank 1, stage 1: 1.00e-16 from the dense model
    rank 1, stage 2: 2.50e-01 from the dense model
"""
    )
    assert "  and 2 more, which --json lists\nlargest deviations" in out and "  gradients  5.00e-01" in out
    _, out, _ = run(capsys, "verify", "tiny", "--json")
    assert json.loads(out)["disagreements"][1]["copies"][1] == {"ranks": [1], "stage": 2, "deviation": 0.25}


def test_verify_says_what_it_turned_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, dropout={"attn_pdrop": 0.1, "resid_pdrop": 0.2})
    _, out, _ = run(capsys, "verify", "tiny")
    assert "without dropout, which no two runs share: attn_pdrop = 0.1, resid_pdrop = 0.2 set to 0" in out
    _, out, _ = run(capsys, "verify", "tiny", "--json")
    assert json.loads(out)["dropout"] == {"attn_pdrop": 0.1, "resid_pdrop": 0.2}


def test_a_fault_of_shardcomp_is_status_3_and_names_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardcomp import lowering

    for error, said in ((InternalError("a promise broke"), "a promise broke"), (ZeroDivisionError("oh"), "ZeroDivisionError")):

        def fail(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(lowering, "lower", fail)
        status, out, err = run(capsys, "inspect", *PLAN)
        assert (status, out) == (3, "")
        assert said in err and "fault of shardcomp" in err and "shardcomp inspect tiny --tensor 2 --seq 32" in err


def test_what_libraries_print_is_kept_from_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardcomp import lowering

    true = lowering.lower

    def noisy(*args: Any, **kwargs: Any) -> Any:
        print("a library says hello")
        return true(*args, **kwargs)

    monkeypatch.setattr(lowering, "lower", noisy)
    _, out, err = run(capsys, "inspect", *PLAN, "--json")
    json.loads(out)
    assert "a library says hello" in err


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m shardcomp.cli inspect tiny --listing | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""


def test_env_tells_versions_devices_and_what_runs_each_operator(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert status == 0 and set(found) == {"versions", "library", "devices", "kernels"}
    assert found["versions"]["shardcomp"] == shardcomp.__version__
    assert found["library"]["kind"] in ("aot", "jit", "reference") and found["library"]["why"]
    assert found["devices"][0]["device"] == "cpu"
    assert {kernel["name"] for kernel in found["kernels"]} == {*NAMES, "embedding", "adamw", "grad_norm"}
    assert all(kernel["runs"] and kernel["why"] for kernel in found["kernels"])
    attends = {kernel["runs"]: kernel["ok"] for kernel in found["kernels"] if kernel["name"] == "attention"}
    assert set(attends) == set(PROVIDERS) and attends["sdpa"] and attends["eager"]
    assert all(kernel["ok"] for kernel in found["kernels"] if kernel["name"] != "attention")
    status, out, _ = run(capsys, "env")
    assert status == 0 and "torch" in out and "attention" in out
