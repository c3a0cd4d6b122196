"""The pretraining driver: what it refuses before anything starts, its learning rate, and a run that learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pretrain
import shardcomp
import training

Capture = pytest.CaptureFixture[str]
TEXT = b"".join(b"%d bottles of beer on the wall\n" % n for n in range(4000))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the point where ranks start has let bad input through."""

    def started(*args: object, **options: object) -> None:
        raise AssertionError("bad input reached shard()")

    monkeypatch.setattr(shardcomp, "shard", started)


def write_config(directory: Path, **changes: int) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


def refused(capsys: Capture, *argv: object) -> str:
    """The one line that a refused command line leaves, with exit status 2 and nothing on stdout."""
    assert pretrain.main([str(part) for part in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pretrain.py: ") and err.count("\n") == 1, err
    return err


@pytest.mark.usefixtures("nothing_starts")
class TestBadInput:
    def test_an_unknown_flag_is_named(self, capsys: Capture) -> None:
        assert "--pipelines" in refused(capsys, "--pipelines", 2)

    def test_a_flag_is_not_abbreviated(self, capsys: Capture) -> None:
        assert "--tens" in refused(capsys, "--tens", 2)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--steps", "0"),
            ("--steps", "many"),
            ("--batch-size", "0"),
            ("--max-length", "1"),
            ("--lr", "0"),
            ("--lr", "nan"),
            ("--warmup", "-1"),
            ("--weight-decay", "-0.1"),
            ("--grad-clip", "0"),
        ],
    )
    def test_a_number_out_of_range_names_its_flag(self, capsys: Capture, flag: str, value: str) -> None:
        assert flag in refused(capsys, flag, value)

    def test_a_vocabulary_that_does_not_hold_a_byte(self, capsys: Capture, tmp_path: Path, text: Path) -> None:
        message = refused(capsys, "-c", write_config(tmp_path, vocab_size=255), "-d", text, "-l", 32)
        assert "255" in message and "256" in message

    def test_a_length_beyond_the_models_positions(self, capsys: Capture, tmp_path: Path, text: Path) -> None:
        message = refused(capsys, "-c", write_config(tmp_path), "-d", text, "-l", 129)
        assert "129" in message and "128" in message

    def test_a_dataset_file_that_is_not_there(self, capsys: Capture, tmp_path: Path) -> None:
        assert "missing.txt" in refused(capsys, "-d", tmp_path / "missing.txt")

    def test_every_missing_file_is_named_at_once(self, capsys: Capture, tmp_path: Path) -> None:
        message = refused(capsys, "-d", tmp_path / "one.txt", "-d", tmp_path / "two.txt", "-f", tmp_path / "three")
        assert "one.txt" in message and "two.txt" in message and "three" in message

    def test_a_dataset_that_does_not_fill_a_step(self, capsys: Capture, tmp_path: Path) -> None:
        small = tmp_path / "small.txt"
        small.write_bytes(TEXT[:40_000])
        message = refused(capsys, "-c", write_config(tmp_path), "-d", small, "-l", 128, "-b", 1000)
        assert "too small" in message and "1000" in message

    def test_a_batch_of_all_ranks_counts(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        message = refused(capsys, "-c", write_config(tmp_path), "-d", text, "-l", 128, "-b", 4000, "--tensor", 2)
        assert "needs 8000" in message

    def test_a_save_directory_that_holds_something_else(self, capsys: Capture, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        assert "thesis.tex" in refused(capsys, "-o", tmp_path)

    def test_a_save_directory_that_is_a_file(self, capsys: Capture, text: Path) -> None:
        assert "not a directory" in refused(capsys, "-o", text)

    def test_a_save_directory_below_a_file(self, capsys: Capture, text: Path) -> None:
        assert "cannot be written" in refused(capsys, "-o", text / "below")

    def test_an_unknown_model(self, capsys: Capture) -> None:
        assert "no-such-model" in refused(capsys, "-c", "./no-such-model")

    def test_rank_0_speaks_and_the_others_give_it_time_first(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        waited: list[float] = []
        monkeypatch.setattr(pretrain.time, "sleep", lambda seconds: (waited.append(seconds), capsys.readouterr()))
        refused(capsys, "--pipelines", 2)
        assert waited == []
        monkeypatch.setenv("RANK", "3")
        assert pretrain.main(["--pipelines", "2"]) == 2
        assert waited == [pretrain.PATIENCE]
        assert capsys.readouterr().err.startswith("pretrain.py, rank 3: ")


def test_a_saved_model_may_be_written_over(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("")
    assert pretrain.file_violations(pretrain.parser().parse_args(["-o", str(tmp_path)])) == []
    assert pretrain.file_violations(pretrain.parser().parse_args(["-o", str(tmp_path / "new" / "folder")])) == []
    assert not (tmp_path / "new").exists()


def test_ranks_that_read_other_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list, mine: str) -> None:
        found[:] = [mine, mine, "other", mine]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(pretrain.InputError, match="rank 2 reads other text than rank 0"):
        pretrain.agree_on_text("mine")


def test_the_learning_rate_rises_and_then_falls_to_a_tenth() -> None:
    rates = [training.learning_rate(step, steps=100, warmup=10) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))


def test_weight_decay_falls_on_matrices_only() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    args = pretrain.parser().parse_args(["--weight-decay", "0.3"])
    matrices, vectors = training.adamw(model, args).param_groups
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.3
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0


def test_a_run_learns_and_saves_what_a_second_run_loads(capsys: Capture, tmp_path: Path, text: Path) -> None:
    config, saved = write_config(tmp_path), tmp_path / "saved"
    common = ["-d", text, "-l", 32, "-b", 4, "--precision", "fp32", "--warmup", 2]
    first = losses(capsys, "-c", config, *common, "--steps", 20, "--lr", 1e-2, "-o", saved)
    assert first["steps"][0] == pytest.approx(math.log(256), rel=0.1)
    assert first["steps"][-1] < first["steps"][0] - 1
    assert first["held_out"] < first["steps"][0] - 1

    again = losses(capsys, "-f", saved, *common, "--steps", 1, "--lr", 1e-12)
    assert again["held_out"] == pytest.approx(first["held_out"], abs=1e-4)
    assert not dist.is_initialized()


def losses(capsys: Capture, *argv: object) -> dict:
    """What a run printed: the loss of each step and the held-out loss."""
    assert pretrain.main([str(part) for part in argv]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    steps = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step ")]
    held_out = [float(line.split()[-1]) for line in lines if line.startswith("held-out loss ")]
    assert len(held_out) == 1
    return {"steps": steps, "held_out": held_out[0]}
