"""Directories of weights that must be refused, and what is said of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardcomp import presets
from shardcomp.errors import CheckpointError
from shardcomp.weights.huggingface import WeightFiles, save_pretrained
from support.models import tiny

EXPECTED = {"a.weight": (4, 3), "b.weight": (2,), "c.weight": (5,)}
WHOLE = (slice(0, 4), slice(0, 3))


def _tensors() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in EXPECTED.items()}


def _shard(directory: Path) -> None:
    tensors = _tensors()
    save_file({name: tensors[name] for name in ("a.weight", "b.weight")}, directory / "model-00001-of-00002.safetensors")
    save_file({"c.weight": tensors["c.weight"]}, directory / "model-00002-of-00002.safetensors")
    where = {"a.weight": 1, "b.weight": 1, "c.weight": 2}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in where.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _message(directory: Path, expected: Any = None, aliases: Any = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(directory).check(expected or EXPECTED, aliases)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    _shard(tmp_path)
    WeightFiles(tmp_path).check(EXPECTED)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in _message(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is not a directory" in _message(tmp_path / "file")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    assert "neither model.safetensors nor model.safetensors.index.json, only nothing" in _message(tmp_path)
    (tmp_path / "readme").touch()
    assert "only readme" in _message(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    message = _message(tmp_path)
    assert name in message and "unpickling runs" in message and "save_pretrained" in message
    assert not (tmp_path / "ran").exists()


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    save_file(
        {"a.weight": torch.zeros(4, 2), "d.weight": torch.zeros(1), "c.weight": torch.zeros(5)}, tmp_path / "model.safetensors"
    )
    message = _message(tmp_path)
    assert "3 violations" in message
    assert "1 of the model's 3 tensors are missing: b.weight" in message
    assert "1 tensors are not the model's: d.weight" in message
    assert "a.weight is 4×2 in model.safetensors and 4×3 in the model" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(50)}, tmp_path / "model.safetensors")
    message = _message(tmp_path, {f"x{i}": (2,) for i in range(50)} | {f"y{i}": (2,) for i in range(50)})
    assert "y7 and 42 more" in message and "42 more tensors have other shapes" in message
    assert len(message) < 2000


def test_frequencies_that_older_releases_saved_are_not_unexpected(tmp_path: Path) -> None:
    save_file(_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    WeightFiles(tmp_path).check(EXPECTED)


@pytest.mark.parametrize("cut", [0, 5, 50, -1])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:cut])
    message = _message(tmp_path)
    assert "model.safetensors is truncated" in message and "missing" not in message


def test_a_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    assert "no safetensors file" in _message(tmp_path)


def test_damage_in_one_shard_does_not_hide_what_is_wrong_with_another(tmp_path: Path) -> None:
    _shard(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    save_file({"c.weight": torch.zeros(6)}, tmp_path / "model-00002-of-00002.safetensors")
    message = _message(tmp_path)
    assert "2 violations" in message and "00001-of-00002.safetensors is truncated" in message and "c.weight is 6" in message


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    _shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = _message(tmp_path)
    assert "model-00002-of-00002.safetensors is missing" in message and "violations" not in message


def test_an_index_that_does_not_say_the_truth(tmp_path: Path) -> None:
    _shard(tmp_path)
    save_file({"b.weight": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    message = _message(tmp_path)
    assert "says that model-00002-of-00002.safetensors holds c.weight, but it does not" in message
    assert "b.weight is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "is damaged" in _message(tmp_path)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    text = json.dumps({"weight_map": {"a.weight": "../secret.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "not a file of this directory" in _message(tmp_path)


def test_quantized_weights(tmp_path: Path) -> None:
    save_file(_tensors() | {"b.weight": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert "b.weight (I8)" in _message(tmp_path)


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 3), "z": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    files.check({"a": (4, 3)}, {"z": "a"})
    with pytest.raises(CheckpointError, match="a and z are one weight.*tie_word_embeddings"):
        files.read("a", WHOLE, torch.float32)


def test_a_file_that_goes_away_after_the_check(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    files.check(EXPECTED)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        files.read("a.weight", WHOLE, torch.float32)
    with pytest.raises(CheckpointError, match="holds no z.weight"):
        files.read("z.weight", WHOLE, torch.float32)


def _save(directory: Path, **more: Any) -> None:
    entry = ("a", (2,), torch.float32, lambda: torch.ones(2))
    save_pretrained(directory, [entry], more.pop("config", tiny()), is_writer=True, **more)


def test_a_directory_that_is_no_earlier_save_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("all my work")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an earlier save.*chapter.tex.*new or empty directory"):
        _save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "all my work"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        _save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_mount_point_is_not_replaced() -> None:
    with pytest.raises(CheckpointError, match="mount point"):
        _save(Path("/proc"))


def test_a_model_without_configuration_or_room_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no HuggingFace configuration"):
        _save(tmp_path / "saved", config=None)
    with pytest.raises(CheckpointError, match="max_shard_size = 0"):
        _save(tmp_path / "saved", max_shard_size=0)
    assert not list(tmp_path.iterdir())


def _llama() -> Any:
    return presets.build(tiny(tie_word_embeddings=True))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_one_weight_under_two_spellings_with_two_values(tmp_path: Path) -> None:
    held = {name: torch.zeros(shape) for name, shape in _shapes(_llama()).items()}
    save_file({**held, "layers.0.mlp.up_proj.weight": torch.ones(48, 32)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    files.check(_shapes(_llama()), None, _llama())
    files.read("model.layers.1.mlp.up_proj.weight", (slice(0, 4), slice(0, 4)), torch.float32)
    with pytest.raises(CheckpointError, match="up_proj.weight and .*up_proj.weight are one weight"):
        files.read("model.layers.0.mlp.up_proj.weight", (slice(0, 4), slice(0, 4)), torch.float32)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "model.bias", "v_head.weight"]
)
def test_a_weight_that_the_model_has_not_is_never_taken_for_something_computed(tmp_path: Path, name: str) -> None:
    held = {each: torch.zeros(shape) for each, shape in _shapes(_llama()).items()}
    save_file({**held, name: torch.zeros(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors are not the model's: {name}; is this another model"):
        WeightFiles(tmp_path).check(_shapes(_llama()), None, _llama())


def test_a_damaged_shard_excuses_what_it_ought_to_hold_by_any_name(tmp_path: Path) -> None:
    shapes = _shapes(_llama())
    where = {name.removeprefix("model."): "model-00001-of-00001.safetensors" for name in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(tmp_path).check(shapes, None, _llama())
    assert "is truncated" in str(caught.value) and "missing" not in str(caught.value)
