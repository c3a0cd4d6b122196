"""Captured calls on disk: what is read is what was captured, and nothing is read that could be anything else."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama

from shardcomp import capture as capturing
from shardcomp import presets
from shardcomp.capture import cache, capture
from shardcomp.capture.captured import Unwritable, read, write
from shardcomp.ir.program import B, Program, S, Signature
from support.families import tiny_config
from support.models import tiny

CALL = Signature((("input_ids", 2), ("labels", 2)), ("loss",))
SHAPE = (3, 18)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SHARDCOMP_CACHE", str(tmp_path))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    return tmp_path / "captures"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each export that is made."""
    calls: list[Any] = []
    true = capturing.export
    monkeypatch.setattr(capturing, "export", lambda *arguments: calls.append(arguments) or true(*arguments))
    return calls


def text(program: Program) -> str:
    """All that is known of a captured Program but the numbers of its buffers."""
    [unit] = program.units
    lines = [
        f"{node.name} {node.target} {node.args} {node.kwargs} {sorted((key, repr(entry)) for key, entry in node.meta.items())}"
        for node in unit.body.graph.nodes
    ]
    known = (program.values, program.parameters, program.output_type, program.static_shape, program.degraded)
    return "\n".join([*lines, repr(known), repr((unit.inputs, unit.outputs, unit.parameters, unit.buffers))])


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mpt", "bloom", "gptj", "gemma2", "olmo2"])
def test_what_is_read_is_what_was_captured(kind: str, precision: str, exported: list[Any]) -> None:
    model = presets.build(tiny_config(kind))
    first = capture(model, CALL, precision=precision)
    exports = len(exported)
    second = capture(presets.build(tiny_config(kind)), CALL, precision=precision)
    assert len(exported) == exports > 0
    assert text(first) == text(second)
    for name, buffer in first.buffers.items():
        assert torch.equal(buffer.value, second.buffers[name].value)
        assert buffer.persistent == second.buffers[name].persistent


def test_another_result_of_a_call_is_read_from_the_same_file(exported: list[Any], folder: Path) -> None:
    capture(presets.build(tiny()), CALL, precision="fp32")
    both = capture(presets.build(tiny()), Signature(CALL.inputs, ("loss", "logits")), precision="fp32")
    assert list(both.outputs) == ["loss", "logits"]
    assert len(exported) == 1 and len(list(folder.iterdir())) == 1


def test_a_graph_of_one_shape_is_kept_for_that_shape(folder: Path, exported: list[Any]) -> None:
    model = presets.build(tiny())
    entry = cache.entry(model, CALL, torch.float32, (2, 8))
    assert entry is not None
    capture(model, CALL, precision="fp32")
    [path] = folder.iterdir()
    content = json.loads(path.read_text())
    content["static_shape"] = [2, 8]
    path.unlink()
    entry.save(read(json.dumps(content)))
    assert [path.name.count("-") for path in folder.iterdir()] == [2]
    assert entry.load() is not None
    other = cache.entry(model, CALL, torch.float32, (2, 9))
    assert other is not None and other.load() is None


def changed(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(model)
    return model


def key(model: nn.Module, call: Signature = CALL, dtype: torch.dtype = torch.float32) -> str:
    entry = cache.entry(model, call, dtype, SHAPE)
    assert entry is not None
    return entry.key


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a setting": lambda model: setattr(model.config, "attention_dropout", 0.5),
    "the implementation of attention": lambda model: setattr(model.config, "_attn_implementation", "eager"),
    "an attribute": lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
    "an attribute in a list": lambda model: setattr(model.model.norm, "sizes", [1, {"a": 2}]),
    "a frozen weight": lambda model: model.lm_head.weight.requires_grad_(False),
    "a tied weight": lambda model: setattr(model.lm_head, "weight", model.model.embed_tokens.weight),
    "a dtype": lambda model: model.lm_head.to(torch.float64),
    "a bias": lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Linear(16, 24, device="meta")),
    "another module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()),
    "a module's setting": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU("tanh")),
    "one layer fewer": lambda model: model.model.layers.__delitem__(0),
}


def test_whatever_an_export_reads_makes_another_key() -> None:
    keys = {name: key(changed(presets.build(tiny()), change)) for name, change in CHANGES.items()}
    keys["the same"] = key(presets.build(tiny()))
    keys["the dtype of the call"] = key(presets.build(tiny()), dtype=torch.float64)
    keys["another call"] = key(presets.build(tiny()), Signature((("input_ids", 2),), ("logits",)))
    keys["another mode"] = key(presets.build(tiny()), Signature(CALL.inputs, CALL.outputs, training=False))
    own = Signature(CALL.inputs, CALL.outputs, training=None)
    keys["each in its own mode"] = key(presets.build(tiny()), own)
    keys["one module in another"] = key(changed(presets.build(tiny()), lambda model: model.model.layers[0].eval()), own)
    assert len(set(keys.values())) == len(keys), keys
    assert key(presets.build(tiny())) == keys["the same"] == key(presets.build(tiny()).eval())


class Own(transformers.LlamaForCausalLM):
    pass


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "a module": lambda model: setattr(model.model.layers[0].mlp, "act_fn", Scaled()),
    "a method": lambda model: setattr(model.model.layers[0].mlp, "forward", doubled),
    "a closure": lambda model: setattr(model.model.norm, "extra", lambda x: x),
    "a partial function": lambda model: setattr(model.model.norm, "extra", functools.partial(doubled)),
    "a hook": lambda model: model.model.norm.register_forward_hook(lambda *arguments: None),
    "a tensor": lambda model: setattr(model.model.norm, "extra", torch.ones(2)),
    "an object": lambda model: setattr(model.model.norm, "extra", object()),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_with_code_or_state_of_its_own_is_not_kept(name: str) -> None:
    assert cache.entry(changed(presets.build(tiny()), FOREIGN[name]), CALL, torch.float32, SHAPE) is None


def test_a_class_of_the_users_own_is_not_kept(folder: Path) -> None:
    with torch.device("meta"):
        model = Own(tiny())
    capture(model, CALL, precision="fp32")
    assert not folder.exists()


def test_a_class_or_a_function_that_was_replaced_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = presets.build(tiny())
    for owner, name in ((modeling_llama.LlamaMLP, "forward"), (modeling_llama, "rotate_half")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, doubled)
            assert cache.entry(model, CALL, torch.float32, SHAPE) is None
    assert cache.entry(model, CALL, torch.float32, SHAPE) is not None


def test_what_wraps_a_function_or_is_put_in_a_table_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = presets.build(tiny())
    true = modeling_llama.LlamaMLP.forward

    @functools.wraps(true)  # which gives it the name and the module of what it wraps
    def wrapped(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * true(self, x)

    for owner, name, value in (
        (modeling_llama.LlamaMLP, "forward", wrapped),
        (modeling_llama.LlamaMLP, "forward", staticmethod(doubled)),
        (nn.functional, "silu", doubled),
        (masking_utils, "sdpa_mask", functools.partial(doubled)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert cache.entry(model, CALL, torch.float32, SHAPE) is None, name
    with monkeypatch.context() as patch:
        patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", doubled)
        assert cache.entry(model, CALL, torch.float32, SHAPE) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert cache.entry(model, CALL, torch.float32, SHAPE) is None
    handle.remove()
    assert cache.entry(model, CALL, torch.float32, SHAPE) is not None


def test_anew_neither_reads_nor_writes(folder: Path, exported: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    capture(presets.build(tiny()), CALL, precision="fp32")
    [path] = folder.iterdir()
    path.write_text("")
    monkeypatch.setenv(cache.VARIABLE, "anew")
    capture(presets.build(tiny()), CALL, precision="fp32")
    assert len(exported) == 2 and path.read_text() == ""


def damaged(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    whole = json.dumps(content)
    yield "nothing", ""
    yield "half", whole[: len(whole) // 2]
    yield "another thing", "[1, 2]"
    calls = [number for number, node in enumerate(content["nodes"]) if "target" in node]
    for target in ("os.system", "aten._no_such_operator.default", "eval", "shardcomp.add_rms_norm.default"):
        yield target, json.dumps(content | {"nodes": replaced(content["nodes"], calls[0], target=target)})
    yield "a missing node", json.dumps(content | {"nodes": replaced(content["nodes"], calls[0], args=[{"node": 10**6}])})
    for kind in ("builtins:eval", "os:system", "transformers:__version__", "transformers.nothing:Nothing"):
        yield kind, json.dumps(content | {"output_type": kind})
    yield "a size", whole.replace('"s"', '["exec", "s"]')
    yield "a dtype", whole.replace("float32", "load")


def replaced(nodes: list[dict[str, Any]], number: int, **entries: Any) -> list[dict[str, Any]]:
    return [node | entries if index == number else node for index, node in enumerate(nodes)]


def test_what_is_damaged_is_captured_anew(folder: Path, exported: list[Any]) -> None:
    capture(presets.build(tiny()), CALL, precision="fp32")
    [path] = folder.iterdir()
    whole = path.read_text()
    for name, damage in damaged(json.loads(whole)):
        with pytest.raises(Unwritable):
            print(name, read(damage))
    path.write_text(damage)
    capture(presets.build(tiny()), CALL, precision="fp32")
    assert len(exported) == 2 and path.read_text() == whole


def test_a_graph_that_is_not_the_models_is_noticed_and_replaced(folder: Path, exported: list[Any]) -> None:
    first = capture(presets.build(tiny()), CALL, precision="fp32")
    [path] = folder.iterdir()
    whole = path.read_text()
    path.write_text(whole.replace("aten.silu.default", "aten.tanh.default"))
    assert text(capture(presets.build(tiny()), CALL, precision="fp32")) == text(first)
    assert len(exported) == 2 and path.read_text() == whole


@pytest.mark.parametrize("of_folder", [False, True])
def test_what_others_can_write_is_not_read(of_folder: bool, folder: Path, exported: list[Any]) -> None:
    capture(presets.build(tiny()), CALL, precision="fp32")
    [path] = folder.iterdir()
    os.chmod(folder if of_folder else path, 0o777 if of_folder else 0o666)
    capture(presets.build(tiny()), CALL, precision="fp32")
    assert len(exported) == 2


def test_a_full_disk_changes_nothing(folder: Path, exported: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    capture(presets.build(tiny()), CALL, precision="fp32")
    assert not list(folder.glob("*.json")) and not list(folder.glob("*.part"))


def test_what_was_not_used_for_longest_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST_FILES", 2)
    for number, layers in enumerate((1, 2, 3)):
        capture(presets.build(tiny(num_hidden_layers=layers)), CALL, precision="fp32")
        for path in folder.iterdir():
            os.utime(path, (number, number)) if path.stat().st_mtime > 10**6 else None
    assert sorted(path.stat().st_mtime for path in folder.iterdir()) == [1, 2]


def test_sizes_of_torchs_and_sympys_functions_are_read_back() -> None:
    captured = capturing._capture_anew(presets.build(tiny()), CALL, torch.float32, SHAPE)
    functions = capturing.captured.size_functions
    node = next(captured.body.calls())
    for size in (
        functions.FloorDiv(S, 2) + 1,
        functions.Mod(S, 3) * B,
        functions.PythonMod(S, 3) - 2,
        (S + 1) / 2,
        B**2 * 0.5,
        functions.ModularIndexing(S, 2, 4),
    ):
        node.args = (*node.args[:1], size)
        [entry] = [node for node in read(write(captured)).body.calls()][:1]
        assert entry.args[1] == size and type(entry.args[1]) is type(size)
