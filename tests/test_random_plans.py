"""Drawn models × topologies × options: a legal plan agrees with the dense model, an illegal one is refused before
anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import event, given, note, settings, target
from hypothesis import strategies as st
from models import tiny

import shardcomp
from shardcomp import ShardError
from shardcomp.schedules import SCHEDULES
from shardcomp.verifier import verify


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, object], int]:
    """(changes of the configuration, options, data-parallel ranks). One draw in two fits its degree by construction."""
    pipeline = draw(st.sampled_from([1, 1, 1, 1, 1, 2]))
    tensor = draw(st.sampled_from([1, 2, 3, 4] if pipeline == 1 else [1, 2]))
    unit = tensor if draw(st.booleans()) else 1
    kv = unit * draw(st.integers(1, 2 if unit > 1 else 4))
    heads = kv * draw(st.integers(1, 3))
    model = {
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": draw(st.sampled_from([2, 4, 8])),
        "hidden_size": heads * draw(st.sampled_from([2, 3, 4])),
        "intermediate_size": unit * draw(st.integers(4, 12)),
        "vocab_size": draw(st.integers(11, 60)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    options = {
        "tensor": tensor,
        "precision": "fp64",
        "micro_batch": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 3)),
        "pipeline": pipeline,
        "schedule": draw(st.sampled_from([*SCHEDULES])),
        "zero": draw(st.integers(0, 3)),
        "recompute": draw(st.sampled_from(["none", "full", "selective", "every:2"])),
    }
    if draw(st.integers(0, 9)) == 0:
        options["virtual_stages"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 9)) == 0:
        options["replicate"] = draw(st.integers(1, 3))
    if draw(st.integers(0, 9)) == 0:
        options["offload"] = draw(st.sampled_from(["optimizer", "parameters", "all", "model.layers.*"]))
    return model, options, draw(st.sampled_from([1, 2])) if pipeline == 1 else 1


def is_legal(model: dict[str, object], options: dict[str, Any], data: int) -> bool:
    schedule = SCHEDULES[options["schedule"]]
    pipelined = options["pipeline"] > 1
    virtual = options.get("virtual_stages") or (schedule.stages_per_rank if pipelined else 1)
    if not pipelined and virtual > 1 or pipelined and virtual != schedule.stages_per_rank and not schedule.interleaves:
        return False
    copies = options.get("replicate", 1)
    if copies > 1 and (options["zero"] == 0 or data % copies):
        return False
    if options.get("offload", "none") not in ("none", "optimizer") and options["zero"] < 3:
        return False
    if int(str(model["num_hidden_layers"])) < options["pipeline"] * virtual:
        return False
    sizes = {key: int(held) for key, held in model.items()}  # type: ignore[call-overload]
    tensor = int(options["tensor"])  # type: ignore[call-overload]
    kv = sizes["num_key_value_heads"]
    heads = sizes["num_attention_heads"] % tensor == 0 and (kv % tensor == 0 or tensor % kv == 0)
    one_head = sizes["num_attention_heads"] == 1 and sizes["head_dim"] % tensor == 0  # gathered, and listed as degraded
    rows = sizes["vocab_size"]
    return (heads or one_head) and sizes["intermediate_size"] % tensor == 0 and math.ceil(rows / tensor) * (tensor - 1) < rows


@pytest.mark.parametrize("sequence_parallel", [True, False])
@settings(max_examples=settings().max_examples // 2)
@given(plan=plans())
def test_a_legal_plan_agrees_and_an_illegal_one_is_refused(
    sequence_parallel: bool, plan: tuple[dict[str, object], dict[str, object], int]
) -> None:
    model, options, data = plan
    options = {**options, "sequence_parallel": sequence_parallel}
    legal = is_legal(model, options, data)
    event("legal" if legal else "illegal")
    note(f"legal: {legal}")
    world = int(options["tensor"]) * int(options["pipeline"]) * data  # type: ignore[call-overload]
    if not legal:
        try:
            policy = shardcomp.Policy.load("llama", **options)
            shardcomp.lower(tiny(**model), policy, world, seq=12)
        except ShardError:
            return
        raise AssertionError("a plan that cannot work was lowered")
    policy = shardcomp.Policy.load("llama", **options)
    found = verify(tiny(**model), policy, world, shrink={"none": True}, kinds=("causal",))
    target(math.log10(max(found.deviation["gradients"], 1e-20)))
    assert found.ok, found
