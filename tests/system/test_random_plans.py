"""Drawn models × topologies × options: a legal plan agrees with the dense model, an illegal one is refused before
anything runs."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import event, given, note, settings, target
from hypothesis import strategies as st

import shardcomp
from shardcomp import ShardError
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.verification.verifier import Verification, verify
from support.models import tiny
from support.selection import LONG, PARTS

Plan = tuple[dict[str, Any], dict[str, Any], int]
"""(changes of the configuration, options, data-parallel ranks)."""

DEGREES = list(itertools.product((1, 2, 3, 4), (1, 2), (1, 2, 3)))  # pipeline, tensor, data
MOST_RANKS = 8
OFFLOAD = ["optimizer", "parameters", "all", "model.layers.*"]
EXAMPLES, ENGINE_EXAMPLES = (300, 120) if LONG else (4, 1)
"""Draws of all parts of a test together."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Models and their splits. One draw in two fits its degree by construction."""
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
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
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    options = {
        "tensor": tensor,
        "precision": "fp64",
        "micro_batch": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 3)),
    }
    return model, options, draw(st.sampled_from([1, 2]))


def engine_plan(seed: int) -> Plan:
    """Pipelines, ZeRO and recompute, on at most eight ranks. Three plans in four fit by construction."""
    draw = random.Random(seed)

    def one_in(n: int) -> bool:
        return draw.randrange(n) == 0

    fits = not one_in(4)
    pipeline, tensor, data = draw.choice([degrees for degrees in DEGREES if math.prod(degrees) <= MOST_RANKS])
    schedule = SCHEDULES[draw.choice([*SCHEDULES])]
    zero = draw.randrange(4)
    options: dict[str, Any] = {
        "tensor": tensor,
        "precision": "fp64",
        "pipeline": pipeline,
        "schedule": schedule.name,
        "zero": zero,
        "recompute": draw.choice(["none", "full", "selective", "every:2"]),
        "micro_batch": draw.choice([1, 2]),
        "sequence_parallel": draw.choice([False, True]),
        "seed": draw.randrange(4),
    }
    if one_in(3):
        free = not fits or (pipeline > 1 and schedule.interleaves)
        options["virtual_stages"] = draw.choice([1, 2, 3] if free else [schedule.stages_per_rank if pipeline > 1 else 1])
    if one_in(3):
        options["replicate"] = draw.choice([n for n in (1, 2, 3) if not fits or n == 1 or (data % n == 0 and zero)])
    if one_in(3):
        options["offload"] = draw.choice(OFFLOAD if zero == 3 or not fits else OFFLOAD[:1])
    stages = pipeline * options.get("virtual_stages", schedule.stages_per_rank) if pipeline > 1 else 1
    kv = draw.choice([2, 4] if fits else [1, 2, 3])
    model = {
        "num_key_value_heads": kv,
        "num_attention_heads": kv * draw.choice([1, 2]),
        "head_dim": 4,
        "hidden_size": 24,
        "intermediate_size": draw.choice([16, 24] if fits else [15, 16]),
        "vocab_size": draw.randint(23, 41),
        "num_hidden_layers": draw.randint(stages if fits else 1, max(8, stages)),
        "tie_word_embeddings": draw.choice([False, True]),
    }
    return model, options, data


def is_legal(model: dict[str, Any], options: dict[str, Any], data: int) -> bool:
    return engine_runs(model, options, data) and splits(model, options["tensor"])


def engine_runs(model: dict[str, Any], options: dict[str, Any], data: int) -> bool:
    pipeline, zero, copies = options.get("pipeline", 1), options.get("zero", 0), options.get("replicate", 1)
    schedule = SCHEDULES[options.get("schedule", "1f1b")]
    virtual = options.get("virtual_stages", schedule.stages_per_rank if pipeline > 1 else 1)
    stages = virtual == 1 if pipeline == 1 else schedule.interleaves or virtual == schedule.stages_per_rank
    layers = pipeline == 1 or model["num_hidden_layers"] >= pipeline * virtual
    shared = copies == 1 or (zero > 0 and data % copies == 0)
    offloaded = options.get("offload", "none") in ("none", "optimizer") or zero == 3
    return stages and layers and shared and offloaded


def splits(model: dict[str, Any], tensor: int) -> bool:
    kv, rows = model["num_key_value_heads"], model["vocab_size"]
    heads = model["num_attention_heads"] % tensor == 0 and (kv % tensor == 0 or tensor % kv == 0)
    one_head = model["num_attention_heads"] == 1 and model["head_dim"] % tensor == 0  # gathered, and listed as degraded
    return (heads or one_head) and model["intermediate_size"] % tensor == 0 and math.ceil(rows / tensor) * (tensor - 1) < rows


def agrees_or_is_refused(plan: Plan, samples: int | None = None) -> Verification | None:
    """What was found of a legal plan, which must agree with the dense model; an illegal one must not be lowered."""
    model, options, data = plan
    legal = is_legal(model, options, data)
    event("legal" if legal else "illegal")
    note(f"legal: {legal}")
    world = options["tensor"] * options.get("pipeline", 1) * data
    if not legal:
        try:
            shardcomp.lower(tiny(**model), shardcomp.Policy.load("llama", **options), world, seq=12)
        except ShardError:
            return None
        raise AssertionError("a plan that cannot work was lowered")
    policy = shardcomp.Policy.load("llama", **options)
    found = verify(tiny(**model), policy, world, shrink={"none": True}, kinds=("causal",), samples=samples)
    assert found.ok, found
    return found


@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=EXAMPLES // PARTS)
@given(plan=plans(), sequence_parallel=st.booleans())
def test_a_legal_plan_agrees_and_an_illegal_one_is_refused(plan: Plan, sequence_parallel: bool, part: int) -> None:
    model, options, data = plan
    found = agrees_or_is_refused((model, {**options, "sequence_parallel": sequence_parallel}, data))
    if found is not None:
        target(math.log10(max(found.deviation["gradients"], 1e-20)))


@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=ENGINE_EXAMPLES // PARTS)
@given(seed=st.integers(0, 2**32), samples=st.integers(1, 6))
def test_so_it_is_with_pipelines_zero_recompute_and_offload(seed: int, samples: int, part: int) -> None:
    plan = engine_plan(seed)
    note(str(plan))
    agrees_or_is_refused(plan, samples)


def test_at_least_half_of_those_plans_are_legal() -> None:
    legal = [is_legal(*engine_plan(seed)) for seed in range(1000)]
    assert 0.5 <= sum(legal) / len(legal) <= 0.9
