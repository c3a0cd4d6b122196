"""Parts of packed weights: rows to runs and back, pieces read from the packed tensor, parts joined bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

import shardcomp
from shardcomp import presets
from shardcomp.errors import CheckpointError, InternalError
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.ir.program import Parameter
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights import source as weight_source
from shardcomp.weights.huggingface import WeightFiles
from shardcomp.weights.initialization import initialize, initialize_parameter
from support.models import tiny


@st.composite
def packings(draw: st.DrawFn) -> dict[str, PackedSlice]:
    """A tensor whose rows are `groups` times the same blocks, such as [q; k; v] once, or [q, k, v] for each head. A part is
    one block of each group."""
    groups = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = groups * sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        f"w.{i}": PackedSlice("w", tuple(shape), dim, start, size, sum(sizes), groups)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }


def tensor_of(parts: dict[str, PackedSlice]) -> torch.Tensor:
    shape = next(iter(parts.values())).shape
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def reader(whole: torch.Tensor) -> Any:
    def read(name: str, index: tuple[slice, ...]) -> torch.Tensor:
        assert name == "w"
        return whole[index]

    return read


def everything(part: PackedSlice) -> list[slice]:
    return [slice(0, part.length if dim == part.dim else size) for dim, size in enumerate(part.shape)]


@given(packings())
def test_rows_make_the_part_again(parts: dict[str, PackedSlice]) -> None:
    for part in parts.values():
        again = PackedSlice.of_rows(part.of, part.shape, part.dim, part.rows())
        assert again is not None and again.rows() == part.rows() and again.length == part.length == len(part.rows())


@given(st.lists(st.integers(0, 12), max_size=8))
def test_rows_that_are_no_runs_at_one_stride_are_no_part(rows: list[int]) -> None:
    found = PackedSlice.of_rows("w", (13,), 0, rows)
    assert found is None or found.rows() == rows


def test_runs_of_unequal_length_or_stride_are_no_part() -> None:
    assert PackedSlice.of_rows("w", (9,), 0, []) is None
    assert PackedSlice.of_rows("w", (9,), 0, [0, 1, 4]) is None
    assert PackedSlice.of_rows("w", (9,), 0, [0, 1, 3, 4, 7, 8]) is None
    assert PackedSlice.of_rows("w", (9,), 0, [0, 1, 3, 4, 6, 7]) == PackedSlice("w", (9,), 0, 0, 2, 3, 3)


@given(packings(), st.data())
def test_ranges_are_the_rows_in_order_and_no_more(parts: dict[str, PackedSlice], data: st.DataObject) -> None:
    for part in parts.values():
        begin = data.draw(st.integers(0, part.length))
        end = data.draw(st.integers(begin, part.length))
        found = [row for each in part.ranges(begin, end) for row in range(each.start, each.stop)]
        assert found == part.rows()[begin:end]


@given(packings(), st.data())
def test_a_piece_is_read_from_the_packed_tensor(parts: dict[str, PackedSlice], data: st.DataObject) -> None:
    whole = tensor_of(parts)
    for part in parts.values():
        expected = whole.index_select(part.dim, torch.tensor(part.rows()))
        index = tuple(everything(part))
        for dim, full in enumerate(index):
            begin = data.draw(st.integers(0, full.stop))
            cut = slice(begin, data.draw(st.integers(begin, full.stop)))
            piece = (*index[:dim], cut, *index[dim + 1 :])
            assert torch.equal(part.read(reader(whole), piece), expected[piece])


@given(packings())
def test_parts_that_are_read_and_joined_are_the_packed_tensor(parts: dict[str, PackedSlice]) -> None:
    whole = tensor_of(parts)
    tensors = {name: part.read(reader(whole), tuple(everything(part))) for name, part in parts.items()}
    assert torch.equal(assemble("w", {**parts, "other": None}, tensors), whole)


def test_a_part_that_is_left_out_is_zero_where_another_is_given() -> None:
    parts = {"w.q": PackedSlice("w", (4,), 0, 0, 2, 2, 1), "w.k": PackedSlice("w", (4,), 0, 2, 2, 2, 1)}
    assert assemble("w", parts, {"w.k": torch.ones(2)}).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("rows", [[0, 1], [1, 2]])
def test_parts_that_are_not_the_whole_tensor_are_our_fault(rows: list[int]) -> None:
    first, second = PackedSlice.of_rows("w", (4,), 0, [2, 3]), PackedSlice.of_rows("w", (4,), 0, rows)
    parts = {"w.a": first} if rows == [0, 1] else {"w.a": first, "w.b": second}
    with pytest.raises(InternalError, match="w: its parts hold"):
        assemble("w", parts, {name: torch.ones(2) for name in parts})


def test_the_models_own_tensors_in_order() -> None:
    part = PackedSlice("b.w", (4,), 0, 0, 2, 2, 1)
    assert group_by_packed({"a": None, "b.w.q": part, "c": None, "b.w.k": part}) == {
        "a": ["a"],
        "b.w": ["b.w.q", "b.w.k"],
        "c": ["c"],
    }


class Packed(torch.nn.Module):
    """A model whose weights are packed, as `weights_of` sees one."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.block = torch.nn.Linear(5, 12, device=device)


def lowered_of(model: torch.nn.Module, of: str = "block.weight") -> Any:
    """What `weights_of` reads of a lowered model whose weight is [q, k, v] for each of two heads, and whose bias is whole."""
    tensors = dict(model.named_parameters())
    parts = {f"{of}.{x}": PackedSlice(of, (12, 5), 0, 2 * i, 2, 6, 2) for i, x in enumerate("qkv")}
    parameters = {name: Parameter(name, (4, 5), torch.float32, part=part) for name, part in parts.items()}
    parameters["block.bias"] = Parameter("block.bias", tuple(tensors["block.bias"].shape), torch.float32)
    program = SimpleNamespace(parameters=parameters, buffers={}, canonical_names=lambda: {})
    policy = SimpleNamespace(options=SimpleNamespace(precision="fp32", seed=3))
    return SimpleNamespace(model=model, program=program, policy=policy)


@pytest.mark.parametrize("source", ["files", "tensors", "rule"])
def test_the_weights_of_parts_come_from_the_packed_tensor(tmp_path: Path, source: str) -> None:
    model = initialize(Packed("meta"), 3)
    whole = model.get_parameter("block.weight").detach()
    if source == "files":
        save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    weights = weights_of(lowered_of(model if source == "tensors" else Packed("meta")), tmp_path if source == "files" else None)
    rows = {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]}
    for x in "qkv":
        for cut in (slice(0, 4), slice(1, 3), slice(2, 4), slice(2, 2)):
            assert torch.equal(weights(f"block.weight.{x}", (cut, slice(1, 4))), whole[rows[x]][cut, 1:4])
    assert torch.equal(weights("block.bias", (slice(3, 12),)), model.get_parameter("block.bias")[3:])


def test_only_the_rows_of_the_rank_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    opened = []

    class Counted(WeightFiles):
        def __init__(self, directory: Any) -> None:
            super().__init__(directory)
            opened.append(self)

    monkeypatch.setattr(weight_source, "WeightFiles", Counted)
    save_file(
        {name: p.detach() for name, p in initialize(Packed("meta"), 3).named_parameters()}, tmp_path / "model.safetensors"
    )
    weights = weights_of(lowered_of(Packed("meta")), tmp_path)
    weights("block.weight.k", (slice(2, 4), slice(0, 5)))
    assert opened[0].bytes_read == 2 * 5 * 4


def test_the_rule_of_a_packed_weight_runs_once_for_its_parts(monkeypatch: Any) -> None:
    drawn = []
    monkeypatch.setattr(
        weight_source, "initialize_parameter", lambda name, *rest: drawn.append(name) or initialize_parameter(name, *rest)
    )
    weights = weights_of(lowered_of(Packed("meta")))
    for x in "qkv":
        weights(f"block.weight.{x}", (slice(0, 4), slice(0, 5)))
    assert drawn == ["block.weight"]


def test_files_are_compared_with_the_packed_names_and_shapes(tmp_path: Path) -> None:
    save_file({"block.weight": torch.ones(11, 5), "other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        weights_of(lowered_of(Packed("meta")), tmp_path)
    message = str(caught.value)
    assert "3 violations" in message and "1 of the model's 2 tensors are missing: block.bias" in message
    assert "not the model's: other.weight" in message and "block.weight is 11×5 in model.safetensors and 12×5" in message
    assert "weight.q" not in message


def with_parts(blueprint: Blueprint) -> Blueprint:
    """The same plan, its q, k and v weights being parts of one packed weight, [q; k; v] along the rows."""
    renamed: dict[str, tuple[str, PackedSlice]] = {}
    for name in blueprint.parameters:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            layer, x = name.rpartition(".self_attn.")[0], name[-len("q_proj.weight")]
            sizes = [blueprint.parameters[f"{layer}.self_attn.{each}_proj.weight"].shape[0] for each in "qkv"]
            start, size = sum(sizes[: "qkv".index(x)]), sizes["qkv".index(x)]
            of = f"{layer}.self_attn.qkv_proj.weight"
            renamed[name] = f"{of}.{x}", PackedSlice(of, (sum(sizes), 32), 0, start, size, size, 1)
    parameters = {}
    for name, plan in blueprint.parameters.items():
        new, part = renamed.get(name, (name, None))
        parameters[new] = replace(plan, part=part)
    units = tuple(
        replace(unit, parameters={short: renamed.get(name, (name, None))[0] for short, name in unit.parameters.items()})
        for unit in blueprint.units
    )
    return replace(blueprint, parameters=parameters, units=units)


def test_parts_are_saved_joined_under_the_packed_name_in_the_masters_dtype(tmp_path: Path) -> None:
    model = initialize(presets.build(tiny()), 0)
    lowered = shardcomp.lower(model, shardcomp.Policy.load("llama", tensor=2, precision="bf16"), 4, seq=8)
    blueprint = with_parts(lowered.blueprint())
    of = weights_of(lowered)

    def weights(name: str, index: tuple[slice, ...]) -> torch.Tensor:
        return of(re.sub(r"qkv_proj\.weight\.([qkv])", r"\1_proj.weight", name), index)

    run_ranks(4, lambda rank: allocate(lowered, weights, blueprint).save_pretrained(tmp_path / "saved", 20_000, strict=False))
    saved = {name: held for path in (tmp_path / "saved").glob("*.safetensors") for name, held in load_file(path).items()}
    expected = dict(model.named_parameters())
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        pieces = [expected.pop(f"{layer}.{x}_proj.weight") for x in "qkv"]
        expected[f"{layer}.qkv_proj.weight"] = torch.nn.Parameter(torch.cat(pieces))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(held, saved[name]) and saved[name].dtype == torch.float32 for name, held in expected.items())
