"""HuggingFace directories: what is saved loads bit for bit, what is read is no more than was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

import shardcomp
from shardcomp import presets
from shardcomp.errors import CheckpointError, InternalError
from shardcomp.weights import huggingface
from shardcomp.weights.huggingface import Entry, WeightFiles, save_pretrained
from support.families import GATE, families, tiny_config
from support.models import tiny

DTYPE = "dtype" if hasattr(tiny(), "dtype") else "torch_dtype"


def _model(seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return shardcomp.initialize(presets.build(tiny(**changes), dtype), seed)


def _entries(model: Any) -> list[Entry]:
    return [(n, tuple(p.shape), p.dtype, lambda p=p: p.detach()) for n, p in model.named_parameters()]


def _save(model: Any, directory: Path, **more: Any) -> None:
    save_pretrained(directory, _entries(model), model.config, is_writer=True, **more)


def _weights(directory: Path) -> WeightFiles:
    return WeightFiles(directory)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [10**9, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_directory_loads_with_transformers_bit_for_bit(
    tmp_path: Path, tied: bool, size: int, dtype: torch.dtype
) -> None:
    model = _model(dtype=dtype, tie_word_embeddings=tied)
    _save(model, tmp_path / "saved", max_shard_size=size)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True, **{DTYPE: "auto"})
    assert type(loaded) is type(model) and loaded.dtype == dtype
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(held, theirs[name]) for name, held in model.named_parameters())
    assert loaded.config.architectures == [type(model).__name__]


def test_files_are_named_and_filled_as_transformers_does(tmp_path: Path) -> None:
    model = _model()
    _save(model, tmp_path / "ours", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    ours, theirs = _files(tmp_path / "ours"), _files(tmp_path / "theirs")
    assert {name for name in ours if "model" in name} == {name for name in theirs if "model" in name}
    index = json.loads(ours["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(held.nbytes for held in model.parameters())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "ours" / file)
        assert sorted(held) == sorted(name for name, at in index["weight_map"].items() if at == file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 20_000


def test_a_model_that_transformers_saved_is_read_back(tmp_path: Path) -> None:
    model = _model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = _weights(tmp_path)
    files.check({n: tuple(p.shape) for n, p in model.named_parameters()}, {"lm_head.weight": "model.embed_tokens.weight"})
    for name, held in model.named_parameters():
        whole = tuple(slice(0, size) for size in held.shape)
        assert torch.equal(files.read(name, whole, torch.float32), held)


def _stored(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """What transformers itself writes for a model."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def _assert_read(model: Any, directory: Path) -> None:
    """The directory holds the model, as the model itself sees it."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {name: first[id(p)] for name, p in every if first[id(p)] != name}
    files = _weights(directory)
    files.check({name: tuple(p.shape) for name, p in model.named_parameters()}, aliases, model)
    for name, held in model.named_parameters():
        whole = tuple(slice(0, size) for size in held.shape)
        assert torch.equal(files.read(name, whole, torch.float32), held), name


KINDS = [name for name in families() if name in GATE]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return shardcomp.initialize(presets.build(tiny_config(request.param)), 0)


def test_what_transformers_saves_of_a_kind_is_read(kind: Any, tmp_path: Path) -> None:
    _stored(kind, tmp_path)
    _assert_read(kind, tmp_path)


def test_a_base_model_that_was_saved_alone_is_read_where_the_head_is_tied(kind: Any, tmp_path: Path) -> None:
    kind.base_model.save_pretrained(tmp_path)
    head = kind.get_output_embeddings().weight
    if head is kind.get_input_embeddings().weight:
        _assert_read(kind, tmp_path)
    else:
        with pytest.raises(CheckpointError, match="1 of the model's .* tensors are missing: .*(lm_head|embed_out).weight"):
            _assert_read(kind, tmp_path)


def test_names_without_the_base_models_prefix_are_read_with_a_head_beside_them(kind: Any, tmp_path: Path) -> None:
    held = {name.removeprefix(f"{kind.base_model_prefix}."): tensor for name, tensor in _stored(kind, tmp_path).items()}
    head = kind.get_output_embeddings().weight.detach()
    save_file({**held, "lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    if hasattr(kind, "lm_head"):
        _assert_read(kind, tmp_path)


def test_names_of_earlier_releases_are_read(tmp_path: Path) -> None:
    model = shardcomp.initialize(presets.build(tiny_config("gpt_neox")), 0)
    held = _stored(model, tmp_path)
    held = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in held.items()}
    assert "embed_out.weight" in held
    save_file(held, tmp_path / "model.safetensors")
    _assert_read(model, tmp_path)


MASK, SCALAR = torch.ones(1, 1, 8, 8), torch.tensor(-1e9)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt2", {"h.0.attn.bias": MASK, "transformer.h.1.attn.bias": MASK, "h.0.attn.masked_bias": SCALAR}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": SCALAR}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt_neo", {"transformer.h.0.attn.attention.bias": MASK, "transformer.h.0.attn.attention.masked_bias": SCALAR}),
        ("gptj", {"transformer.h.0.attn.bias": MASK.bool(), "transformer.h.0.attn.masked_bias": SCALAR}),
        ("codegen", {"transformer.h.0.attn.causal_mask": MASK}),
        ("gpt_bigcode", {"transformer.bias": torch.ones(64, 64, dtype=torch.bool)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("stablelm", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ],
)
def test_what_earlier_releases_saved_besides_is_not_minded(tmp_path: Path, name: str, more: dict[str, torch.Tensor]) -> None:
    model = shardcomp.initialize(presets.build(tiny_config(name)), 0)
    held = _stored(model, tmp_path)
    save_file({**held, **{key: tensor.clone() for key, tensor in more.items()}}, tmp_path / "model.safetensors")
    _assert_read(model, tmp_path)


def test_only_the_slice_is_read_and_counted(tmp_path: Path) -> None:
    model = _model(dtype=torch.bfloat16)
    _save(model, tmp_path / "saved")
    files = _weights(tmp_path / "saved")
    files.check({n: tuple(p.shape) for n, p in model.named_parameters()}, {})
    assert files.bytes_read == 0
    name = "model.layers.0.mlp.down_proj.weight"
    part = files.read(name, (slice(8, 16), slice(3, 5)), torch.float32)
    assert files.bytes_read == 8 * 2 * 2
    assert torch.equal(part, model.get_parameter(name)[8:16, 3:5].float())
    assert files.read("lm_head.weight", (slice(97, 97), slice(0, 32)), torch.float32).shape == (0, 32)
    assert files.bytes_read == 8 * 2 * 2


@pytest.mark.parametrize(
    "index", [(slice(0, 7), slice(3, 5), slice(0, 3)), (slice(2, 6), slice(0, 9), slice(1, 1)), (slice(4, 4),)]
)
def test_a_slice_that_is_read_in_blocks_is_the_slice(tmp_path: Path, monkeypatch: Any, index: tuple[slice, ...]) -> None:
    table = torch.randn(7, 9, 3) if len(index) > 1 else torch.randn(7)
    save_file({"a": table, "b": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    for size in (1, 200, 10**6):
        monkeypatch.setattr(huggingface, "BLOCK", size)
        files = _weights(tmp_path)
        files.check({"a": tuple(table.shape), "b": ()})
        assert torch.equal(files.read("a", index, torch.float64), table[index].double())
        assert files.bytes_read == table[index].nbytes
        assert files.read("b", (), torch.bfloat16) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory a process had at most")
def test_no_more_of_a_file_than_a_block_is_in_memory(tmp_path: Path) -> None:
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    save_file({"a": torch.ones(4096, 8192, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")  # 64 MiB
    files = _weights(tmp_path)
    for index in ((slice(0, 4096), slice(0, 1024)), (slice(1024, 1536), slice(0, 8192))):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        held = files.read("a", index, torch.bfloat16)
        assert status("VmHWM") - before < held.nbytes + 1.5 * huggingface.BLOCK


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    _save(_model(), tmp_path / "saved")
    files = _weights(tmp_path / "saved")
    held = files.read("model.norm.weight", (slice(0, 32),), torch.float32)
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(held, torch.ones(32))


@pytest.mark.parametrize(
    "stored", [["model.embed_tokens.weight"], ["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]]
)
def test_a_tied_weight_is_found_under_whichever_names_it_is_stored(tmp_path: Path, stored: list[str]) -> None:
    table = torch.randn(6, 2)
    save_file({name: table.clone() for name in stored}, tmp_path / "model.safetensors")
    files = _weights(tmp_path)
    files.check({"model.embed_tokens.weight": (6, 2)}, {"lm_head.weight": "model.embed_tokens.weight"})
    assert torch.equal(files.read("model.embed_tokens.weight", (slice(2, 4), slice(0, 2)), torch.float32), table[2:4])


def test_the_writer_holds_one_file_at_a_time_and_the_others_nothing(tmp_path: Path) -> None:
    held = torch.ones(100)
    alive: list[int] = []

    def entries(log: list[str]) -> Iterator[Entry]:
        import weakref

        kept: list[Any] = []

        def fetch(name: str) -> torch.Tensor:
            log.append(name)
            tensor = held.clone()
            kept.append(weakref.ref(tensor))
            alive.append(sum(reference() is not None for reference in kept))
            return tensor

        for i in range(6):
            yield f"weight{i}", (100,), torch.float32, lambda i=i: fetch(f"weight{i}")

    calls: list[str] = []
    save_pretrained(tmp_path / "saved", entries(calls), tiny(), is_writer=True, max_shard_size=800)
    assert max(alive) <= 3  # two to a file, and one that is just being replaced
    alive.clear()
    others: list[str] = []
    save_pretrained(tmp_path / "elsewhere", entries(others), tiny(), is_writer=False, max_shard_size=800)
    assert calls == others == [f"weight{i}" for i in range(6)]
    assert max(alive) == 1 and not (tmp_path / "elsewhere").exists()


def test_a_later_save_replaces_the_weights_and_keeps_other_files(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    _save(_model(1), directory, max_shard_size=20_000)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "notes").mkdir()
    (directory / "notes" / "today").write_text("fine")
    _save(_model(2), directory)
    names = set(_files(directory))
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "notes/today"}
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), _model(2).parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_save_that_fails_leaves_what_was_there_and_calls_everything(tmp_path: Path, monkeypatch: Any) -> None:
    directory = tmp_path / "saved"
    _save(_model(1), directory)
    before = _files(directory)
    model, calls = _model(2), []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        raise OSError(28, "No space left on device")

    entries = [(n, s, d, lambda n=n, f=fetch: calls.append(n) or f()) for n, s, d, fetch in _entries(model)]
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(huggingface, "save_file", full)
        save_pretrained(directory, entries, model.config, is_writer=True, max_shard_size=20_000)
    assert calls == [name for name, _ in model.named_parameters()]
    assert _files(directory) == before and [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_collective_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    _save(_model(1), directory)
    before = _files(directory)

    def broken() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pretrained(directory, [("a", (1,), torch.float32, broken)], tiny(), is_writer=True)
    assert _files(directory) == before and [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_failing_move_puts_the_earlier_save_back(tmp_path: Path, monkeypatch: Any) -> None:
    directory = tmp_path / "saved"
    _save(_model(1), directory)
    before = _files(directory)
    rename = Path.rename

    def once(self: Path, target: Path) -> Path:
        if self.name == ".saved.saving":
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cross-device"):
        patch.setattr(Path, "rename", once)
        _save(_model(2), directory)
    assert _files(directory) == before and [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_an_interrupted_save_left_is_put_back_or_cleared_by_the_next(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    _save(_model(1), directory)
    (directory / "tokenizer.json").write_text("{}")
    directory.rename(tmp_path / ".saved.previous")  # killed between the two renames
    (tmp_path / ".saved.saving").mkdir()
    (tmp_path / ".saved.saving" / "half").write_text("")
    _save(_model(2), directory)
    assert set(_files(directory)) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_empty_directory_a_relative_path_and_a_link_are_fine(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "empty").mkdir()
    _save(_model(), tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    _save(_model(), Path("below/here"))
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    _save(_model(2), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for name in ("empty", "below/here"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        _save(_model(), tmp_path / "saved")
    finally:
        os.umask(before)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_generation_config_is_saved_beside_the_model(tmp_path: Path) -> None:
    _save(_model(), tmp_path / "saved", generation_config=GenerationConfig(max_new_tokens=7))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.max_new_tokens == 7


def test_the_configuration_in_hand_is_not_changed_by_saving(tmp_path: Path) -> None:
    model = _model()
    model.config.architectures = None
    before = model.config.to_dict()
    save_pretrained(
        tmp_path / "saved", [("a", (2,), torch.float16, lambda: torch.ones(2).half())], model.config, is_writer=True
    )
    assert model.config.to_dict() == before


def test_a_tensor_that_is_not_what_was_announced_is_our_fault(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="a: .* was to be"):
        save_pretrained(tmp_path / "saved", [("a", (2,), torch.float32, lambda: torch.ones(3))], tiny(), is_writer=True)
    assert not (tmp_path / "saved").exists()
