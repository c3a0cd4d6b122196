"""`compile = true`: torch.compile runs the units, gives what they give, and compiles alike units once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

import shardcomp
from shardcomp import presets
from shardcomp.runtime import unit
from shardcomp.runtime.blueprint import Blueprint


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced, differentiated and run as it was traced, with the very same operators: what a compiler starts from."""
    monkeypatch.setattr(unit, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    unit._compiled.clear()
    counters.clear()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(config: dict[str, Any], **options: Any) -> tuple[list[float], list[Tensor]]:
    """The losses of two steps, and the weights after them."""
    found = presets.config_of("tiny")
    found.update({"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "head_dim": 4, **config})
    sharded = shardcomp.shard(presets.build(found), shardcomp.Policy.load("llama", **options))
    optimizer = shardcomp.AdamW(sharded.parameters(), lr=1e-2)
    losses = []
    for step in range(2):
        tokens = torch.randint(0, 260, (4, 16), generator=torch.Generator().manual_seed(step))
        losses.append(float(sharded.train_step(input_ids=tokens, labels=tokens).loss))
        sharded.optimizer_step(optimizer, max_norm=1.0)
        optimizer.zero_grad()
    return losses, [p.detach().to_local().clone() for p in sharded.parameters()]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"recompute": "full", "zero": 3, "micro_batch": 2}),
        ({}, {"recompute": "selective"}),
        ({"attention_dropout": 0.2}, {"recompute": "full"}),
    ],
    ids=str,
)
def test_a_run_has_the_bits_that_it_has_uncompiled(config: dict[str, Any], options: dict[str, Any]) -> None:
    losses, weights = trained(config, **options)
    assert not counters["stats"]
    compiled_losses, compiled_weights = trained(config, compile=True, **options)
    assert counters["stats"]["calls_captured"] > 10
    assert compiled_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(compiled_weights, weights, strict=True))


def test_alike_units_are_compiled_once_and_products_stay_as_they_are() -> None:
    expected = trained({})[0]
    assert trained({}, compile=True)[0] == expected
    graphs = counters["stats"]["unique_graphs"]
    assert counters["graph_break"]
    assert all("function linear" in reason or "fan_out" in reason for reason in counters["graph_break"])
    counters.clear()
    trained({"num_hidden_layers": 5}, compile=True)
    assert counters["stats"]["unique_graphs"] == graphs - 1  # that was the attempt whether it works


@pytest.mark.long  # the bits of a compiled run are compared below
def test_collectives_stay_as_they_are_between_compiled_pieces() -> None:
    policy = shardcomp.Policy.load("llama", tensor=2, precision="fp32", compile=True)
    found = shardcomp.verify("tiny", policy, 2, shrink={"num_hidden_layers": 2}, kinds=("causal",))
    assert found.ok and counters["stats"]["calls_captured"] > 10
    assert "--compile true" in found.reproduce


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv", "dualpipev"])
def test_schedules_that_split_the_backward_are_refused(schedule: str) -> None:
    with pytest.raises(shardcomp.PolicyError, match=f"{schedule} would run twice: use schedule = 1f1b, gpipe or interleaved"):
        shardcomp.Policy.load("llama", pipeline=2, schedule=schedule, compile=True)
    shardcomp.Policy.load("llama", pipeline=2, schedule=schedule)
    shardcomp.Policy.load("llama", pipeline=1, schedule=schedule, compile=True)


def test_where_torch_compile_does_not_work_it_is_refused_before_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "BACKEND", "no such")
    with pytest.raises(shardcomp.PlanError, match=r"compile = true, but torch.compile does not work on cpu here: .*no such"):
        trained({}, compile=True)
    assert not dist.is_initialized()


def test_the_switch_is_saved_with_the_source(tmp_path: Path) -> None:
    low = shardcomp.lower("tiny", shardcomp.Policy.load("llama", compile=True), 1)
    low.save_source(tmp_path)
    assert Blueprint.load(tmp_path).compile
