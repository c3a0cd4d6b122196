"""What a unit saves for its backward, as predicted and as measured on real tensors, to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import shardcomp
from shardcomp.cost.activations import repeated_messages, stage_activations, unit_activations
from shardcomp.cost.communication import _unit_messages
from shardcomp.cost.flops import Share, of_node
from shardcomp.ir.program import B, S
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.unit import Unit
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from support.families import GATE, families, tiny_config
from support.models import tiny
from support.storages import Made

pytestmark = pytest.mark.usefixtures("chunked_losses")

LENGTH = 16


@contextlib.contextmanager
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, str], list[int]]]:
    """(rank, unit) -> the bytes that each call made and left behind, its results apart."""
    found: dict[tuple[int, str], list[int]] = {}
    true = Unit._run

    def run(self: Unit, *inputs: Tensor) -> Any:
        with Made() as made:
            results = true(self, *inputs)
        found.setdefault((torch.distributed.get_rank(), self.unit_parameters.path), []).append(made.left(tree_leaves(results)))
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Unit, "_run", run)
        yield found


def lowered_for(config: Any, policy: str = "llama", world: int | None = None, **options: Any) -> Lowered:
    chosen = shardcomp.Policy.load(policy, **options)
    return shardcomp.lower(config, chosen, world or chosen.options.ranks, seq=LENGTH, sample=(1, LENGTH))


def forward(lowered: Lowered, vocabulary: int) -> list[tuple[int, int]]:
    """For every rank: the bytes that a whole forward leaves, and what it was predicted to leave."""
    weights, batch = weights_of(lowered), batches(vocabulary, 1, LENGTH, 0)["causal"]

    def work(rank: int) -> tuple[int, int]:
        sharded: ShardedModel = allocate(lowered, weights)
        sharded.train_step(**batch)  # FSDP sets itself up, and gathers
        code = sharded._calls.of(batch, ("loss",), sharded.training)
        inputs = {**batch, "num_items_in_batch": torch.tensor(1)}
        chunk = sharded._stage_shards[0]
        chunk.root(code.stages[0].forward, **inputs)  # the copies to compute with are there
        with Made() as made:
            found = chunk.root(code.stages[0].forward, **inputs)
        program = lowered.program
        predicted = stage_activations(program, program.units, 1, LENGTH, lowered.mesh.coordinates(rank))
        copies = [p for home in chunk.unit_parameters for p in home.gathered]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in copies]
        return made.left([found["loss"], *local]), predicted - sum(_callers(lowered, rank).values())

    return run_ranks(lowered.mesh.world_size, work)


def _callers(lowered: Lowered, rank: int) -> dict[str, int]:
    """The bytes of the caller's own tensors that are held."""
    program, found = lowered.program, dict[str, int]()
    for unit in program.units:
        saved = unit_activations(program, unit, 1, LENGTH, lowered.mesh.coordinates(rank))
        for name, size in zip(unit.inputs, saved.inputs, strict=True):
            if name in program.inputs:
                found[name] = max(found.get(name, 0), size)
    return found


@pytest.mark.grid
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "every:2"])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_unit_saves_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, recompute: str, tensor: int, sequence_parallel: bool, precision: str
) -> None:
    tied = tensor == 2
    config = tiny(num_hidden_layers=3, tie_word_embeddings=tied)
    options = {"tensor": tensor, "sequence_parallel": sequence_parallel, "precision": precision, "recompute": recompute}
    lowered = lowered_for(config, **options)
    check(monkeypatch, lowered, 97)
    for left, predicted in forward(lowered, 97):
        assert left == predicted


def check(monkeypatch: pytest.MonkeyPatch, lowered: Lowered, vocabulary: int) -> None:
    weights, batch = weights_of(lowered), batches(vocabulary, 1, LENGTH, 0)["causal"]
    with measured(monkeypatch) as found:
        run_ranks(lowered.mesh.world_size, lambda rank: allocate(lowered, weights).train_step(**batch))
    program = lowered.program
    for rank in range(lowered.mesh.world_size):
        for unit in program.units:
            saved = unit_activations(program, unit, 1, LENGTH, lowered.mesh.coordinates(rank))
            assert found[rank, unit.path] == [saved.own], (unit.path, saved)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("family", "recompute"),
    [(name, "selective") for name in families()] + [(name, "none") for name in families() if name in GATE],
)
def test_a_unit_of_every_family_saves_what_was_predicted(monkeypatch: pytest.MonkeyPatch, family: str, recompute: str) -> None:
    lowered = lowered_for(tiny_config(family), "auto", tensor=2, precision="bf16", recompute=recompute)
    check(monkeypatch, lowered, 131)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_unit_whose_weights_are_frozen_saves_what_was_predicted(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    model = shardcomp.initialize(shardcomp.presets.build(tiny(num_hidden_layers=3)), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name or "q_proj" in name or "lm_head" in name)
    check(monkeypatch, lowered_for(model, tensor=2, precision="bf16", recompute=recompute), 97)


def test_repeated_messages_are_those_before_the_last_value_that_is_needed() -> None:
    full = lowered_for(tiny(), tensor=2, recompute="full")
    selective = lowered_for(tiny(), tensor=2, recompute="selective")
    rank = full.mesh.coordinates(0)
    [layer, kept] = [next(u for u in each.program.units if u.kind == "layer") for each in (full, selective)]
    sent = [m for m in _unit_messages(full.program, layer, rank) if m[2] == "forward"]
    again = [op for op, *_ in repeated_messages(full.program, layer, 1, LENGTH, rank)]
    assert again == [op for op, *_ in sent][:-1] == ["all_gather", "reduce_scatter", "all_gather"]
    assert [op for op, *_ in repeated_messages(selective.program, kept, 1, LENGTH, rank)] == ["all_gather", "all_gather"]
    assert not list(repeated_messages(full.program, full.program.units[0], 1, LENGTH, rank))


@pytest.mark.parametrize("tensor", [1, 2])
def test_all_products_but_the_last_are_computed_again_and_none_under_selective(tensor: int) -> None:
    for recompute in ("full", "selective", "none"):
        lowered = lowered_for(tiny(num_key_value_heads=4), tensor=tensor, recompute=recompute, precision="bf16")
        unit = next(u for u in lowered.program.units if u.kind == "layer")
        rank = lowered.mesh.coordinates(0)
        share = Share(lowered.mesh.as_dict(), rank)
        every = [of_node(node, share).forward.products for node in unit.body.calls()]
        products = [int(sympy.sympify(count).subs({B: 2, S: LENGTH})) for count in every if count]
        found = unit_activations(lowered.program, unit, 2, LENGTH, rank).products
        assert found == (sum(products[:-1]) if recompute == "full" else 0)


def test_full_keeps_the_input_alone_and_selective_less_than_all() -> None:
    size = {}
    for recompute in ("none", "selective", "full"):
        lowered = lowered_for(tiny(), recompute=recompute, precision="bf16")
        unit = next(u for u in lowered.program.units if u.kind == "layer")
        size[recompute] = unit_activations(lowered.program, unit, 2, LENGTH, lowered.mesh.coordinates(0)).bytes
    assert size["full"] == 2 * LENGTH * 32 * 2
    assert size["full"] < size["selective"] < size["none"]


@pytest.mark.parametrize("kernels", ["all", "none"])
def test_kernels_leave_what_they_promise(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    h, f, a, g = 32, 48, 4, 2
    config = tiny(hidden_size=h, intermediate_size=f, num_attention_heads=a, num_key_value_heads=g)
    lowered = lowered_for(config, precision="bf16", kernels=kernels)
    check(monkeypatch, lowered, 97)
    layer = next(unit for unit in lowered.program.units if unit.kind == "layer")
    saved = unit_activations(lowered.program, layer, 1, LENGTH, lowered.mesh.coordinates(0)).bytes
    with_kernels = LENGTH * (12 * h + 4 * h * g // a + 6 * f + 4 * a + 16)
    without = LENGTH * (20 * h + 4 * h * g // a + 8 * f + 4 * a + 8)
    assert (saved <= with_kernels) if kernels == "all" else (with_kernels < saved <= 1.5 * without)
