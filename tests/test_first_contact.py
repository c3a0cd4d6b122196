"""What a newcomer meets first: names, messages that say everything at once, completion, the chart of a run."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import chart
import shardcomp
from shardcomp import cli, presets
from shardcomp.errors import InternalError, PlanError, PolicyError, ShardError, Violations, raise_all


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line that is refused prints."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    return err


def test_dir_lists_the_public_names_and_each_is_there() -> None:
    assert set(shardcomp.__all__) <= set(dir(shardcomp))
    assert {"AdamW", "verify", "SampleStream", "Stream", "lower", "shard"} <= set(dir(shardcomp))
    assert all(hasattr(shardcomp, name) for name in dir(shardcomp))
    assert shardcomp.Stream is shardcomp.SampleStream


def test_a_bad_degree_shows_all_its_violations_and_none_of_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "inspect", "tiny", "--tensor", "3")
    assert "4 violations" in err and "num_attention_heads" in err and "seq" not in err


def test_violations_of_options_names_and_the_model_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--tensor",
        "3",
        "--pipeline",
        "7",
        "--seq",
        "100",
        "--rank",
        "99",
        "--after",
        "tensr",
        "--listing",
        "--precision",
        "fp8",
    ]
    err = refused(capsys, "inspect", "tiny", *flags)
    for said in ('precision = "fp8"', "rank 99", "'tensr'", "seq = 100", "num_attention_heads", "pipeline = 7 makes 7 stages"):
        assert said in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tensor 8 --world 12 --seq 33", ("does not divide a world of 12", "seq = 33")),
        ("--data 2 --global-batch 3 --tensor 8 --seq 33", ("use 2 or 4", "use 32 or 40")),
        ("--virtual-stages 3 --tensor 8 --rank 9", ("virtual_stages = 3 needs a pipeline", "rank 9")),
    ],
)
def test_no_second_run_finds_more(capsys: pytest.CaptureFixture[str], flags: str, said: tuple[str, ...]) -> None:
    err = refused(capsys, "inspect", "tiny", *flags.split())
    assert all(text in err for text in said), err


def test_a_default_length_that_does_not_split_adapts_and_the_report_says_so() -> None:
    config = presets.config_of("tiny")
    config.num_attention_heads = config.num_key_value_heads = 6
    config.hidden_size, config.intermediate_size, config.vocab_size = 96, 96, 96
    found = shardcomp.lower(config, shardcomp.Policy.load("llama", tensor=6)).report()
    assert found["step"]["seq"] == 2046
    assert {"what": "seq = 2046", "why": "the default, 2048, does not split over tensor = 6"} in found["degraded"]
    with pytest.raises(PlanError, match="seq = 2048 does not split over tensor = 6: use 2046 or 2052"):
        shardcomp.lower(config, shardcomp.Policy.load("llama", tensor=6), seq=2048)


def test_violations_are_collected_in_one_error() -> None:
    several = Violations("here")
    for texts in (["a", "b"], ["b", "c"]):
        with several.collected():
            raise_all(PolicyError, "here", texts)
    with pytest.raises(PolicyError, match=r"here: 3 violations\n  1. a\n  2. b\n  3. c"):
        several.raise_if_any()
    with several.collected():
        raise PlanError("here: d")
    with pytest.raises(PlanError, match="4. d"):
        several.raise_if_any()
    with pytest.raises(InternalError), several.collected():
        raise InternalError("a promise")
    Violations("here").raise_if_any()


def test_a_misspelt_preset_is_refused_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_unreachable", lambda name: pytest.fail("the hub was asked"))
    assert "did you mean the preset 'tiny'?" in refused(capsys, "inspect", "tin")
    assert "did you mean the preset 'llama-2-7b'?" in refused(capsys, "inspect", "llama2-7b")


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(url: str, **options: Any) -> None:
        asked.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(ShardError, match="nobody/nothing is not a preset.*cannot be reached: no network; give a preset"):
        presets.config_of("nobody/nothing")
    assert asked == ["https://huggingface.co/nobody/nothing/resolve/main/config.json"]


def test_a_hub_that_answers_leaves_the_rest_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    calls: list[tuple[str, bool]] = []

    def load(name: str, **options: Any) -> str:
        calls.append((name, options["local_files_only"]))
        return "a configuration"

    monkeypatch.setattr(AutoConfig, "from_pretrained", load)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **options: None)
    assert presets.config_of("some/model") == "a configuration"
    monkeypatch.setattr(presets, "_unreachable", lambda name: ConnectionError("no network"))
    monkeypatch.setattr(presets, "_is_stored", lambda name: True)
    assert presets.config_of("some/model") == "a configuration"
    assert calls == [("some/model", False), ("some/model", True)]


def test_a_misspelt_flag_has_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "inspect", "tiny", "--tensr", "2", "--prescision", "bf16")
    assert "--tensr 2 --prescision bf16; did you mean --tensor for --tensr, --precision for --prescision?" in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ins"], ["inspect"]),
        (["inspect", "ti"], ["tiny"]),
        (["inspect", "tiny", "--prec"], ["--precision"]),
        (["inspect", "tiny", "--precision", ""], ["bf16", "fp32", "fp16", "fp64"]),
        (["inspect", "tiny", "--precision=b"], ["--precision=bf16"]),
        (["inspect", "tiny", "--precision", "=", "b"], ["bf16"]),
        (["inspect", "tiny", "--recompute", ""], ["none", "full", "selective"]),
        (["verify", "tiny", "--policy", "lla"], ["llama"]),
        (["inspect", "tiny", "--diff", "tensor"], ["tensor_parallel"]),
        (["convert", "runs", "hf", "--dtype", "bf"], ["bf16"]),
        (["convert", ""], []),
        (["no-command", ""], []),
    ],
)
def test_completion(words: list[str], found: list[str]) -> None:
    assert cli.complete(words) == found


def test_completion_knows_every_command_flag_and_preset() -> None:
    assert {"inspect", "verify", "resume-check", "convert", "env", "completion"} <= set(cli.complete([""]))
    assert cli.complete(["inspect", ""]) == presets.names()
    [commands] = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(cli.complete(["verify", "tiny", "--"])) == set(cli._flags(commands.choices["verify"]))


def test_pass_names_are_those_that_run() -> None:
    from shardcomp import pass_runner
    from shardcomp.lowering import PASSES

    assert set(cli.pass_names()) == {"capture", *map(pass_runner.name_of, PASSES)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert cli.main(["completion", shell]) == 0
    assert "shardcomp --complete" in capsys.readouterr().out


def test_bash_completes_with_the_script() -> None:
    script = cli.SCRIPTS["bash"].replace("$(shardcomp ", f"$({sys.executable} -m shardcomp.cli ")
    ask = "COMP_WORDS=(shardcomp inspect tiny --numerics ''); COMP_CWORD=4; _shardcomp; echo ${COMPREPLY[@]}"
    answer = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["hf", "fp32"]


LINES = {
    "ins": ["inspect"],
    "inspect tiny --prec": ["--precision"],
    "inspect tiny --precision ": ["bf16", "fp16", "fp32", "fp64"],
    "verify tiny --policy lla": ["llama"],
    "inspect ti": ["tiny"],
}
"""What is typed after `shardcomp ` -> what the shell offers, sorted."""


@pytest.fixture
def with_command(tmp_path: Path) -> dict[str, str]:
    """An environment whose path has the command `shardcomp` of this Python."""
    command = tmp_path / "bin" / "shardcomp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m shardcomp.cli "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes_with_the_script(with_command: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    asks = "; ".join(f"complete -C 'shardcomp {line}'; echo" for line in [*LINES, "convert note"])
    command = ["fish", "--no-config", "-c", f"shardcomp completion fish | source; {asks}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=with_command, cwd=tmp_path)
    offered = [sorted(block.split()) for block in answer.stdout.split("\n\n")]
    assert offered[: len(LINES)] == list(LINES.values())
    assert offered[len(LINES)] == ["notes.txt"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes_with_the_script(with_command: dict[str, str], tmp_path: Path) -> None:
    """`compadd` offers words only while someone types, so a stand-in prints what it is called with."""
    asks = [
        f"words=(shardcomp {line}{chr(39) * 2 if line.endswith(' ') else ''}); CURRENT=$#words; _shardcomp" for line in LINES
    ]
    stubs = 'compadd() { shift; print -r -- "${(o)@}"; }; _files() { print files; }'
    files = "words=(shardcomp convert note); CURRENT=3; _shardcomp"
    script = "; ".join(["source <(shardcomp completion zsh)", stubs, *asks, files])
    answer = subprocess.run(
        ["zsh", "-f", "-c", script], capture_output=True, text=True, check=True, env=with_command, cwd=tmp_path
    )
    assert [line.split() for line in answer.stdout.splitlines()] == [*LINES.values(), ["files"]]


@pytest.mark.parametrize(
    "words", [["--complete", "inspect", ""], ["--complete", "inspect", "x", "--diff", ""], ["inspect", "tin"]]
)
def test_what_a_shell_waits_for_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from shardcomp import cli; assert cli.main({words!r}) in (0, 2)"
    code += "\nassert not {'torch', 'transformers', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_chart_shows_every_step_that_counts(tmp_path: Path) -> None:
    log, picture = tmp_path / "log.jsonl", tmp_path / "log.svg"
    log.write_text(
        '{"event": "start", "step": 0}\n{"step": 1, "loss": 9.0}\n{"step": 1, "loss": 5.5}\n{"step": 2, "loss": NaN}\n{"st'
    )
    assert chart.read_losses(log) == {1: 5.5}
    assert chart.write_chart(log, picture, "loss of <tiny>")
    losses = {step: 5 - step / 1000 for step in range(1, 3001)}
    for text in (picture.read_text(), chart.draw(losses, "many")):
        root = ElementTree.fromstring(text)
        assert len(root.findall("{*}polyline")) == 1
    [line] = root.findall("{*}polyline")
    assert len(line.attrib["points"].split()) == 1000
    log.write_text("")
    assert not chart.write_chart(log, picture, "nothing")


def test_ticks_are_round_numbers_around_the_values() -> None:
    assert chart.nice_ticks(1.3, 5.6) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for low, high in ((2.013, 2.041), (0.0, 1e-6), (3.0, 900.0)):
        ticks = chart.nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8
