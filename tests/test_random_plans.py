"""Drawn models × topologies × options: a legal plan agrees with the dense model, an illegal one is refused before
anything runs."""

from __future__ import annotations

import math

from hypothesis import assume, given, note, target
from hypothesis import strategies as st
from models import tiny

import shardcomp
from shardcomp import ShardError
from shardcomp.verifier import verify

LEGAL = {"legal": 0, "drawn": 0}


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, object], int]:
    head = draw(st.sampled_from([2, 4, 8]))
    kv = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv * draw(st.integers(1, 3))
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
    model = {
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": head,
        "hidden_size": heads * draw(st.sampled_from([2, 3, 4])),
        "intermediate_size": draw(st.sampled_from([12, 24, 36, 40])),
        "vocab_size": draw(st.integers(11, 60)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }
    options = {
        "tensor": tensor,
        "sequence_parallel": draw(st.booleans()),
        "precision": "fp64",
        "micro_batch": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 3)),
    }
    return model, options, draw(st.sampled_from([1, 2]))


def is_legal(model: dict[str, object], options: dict[str, object]) -> bool:
    tensor = int(options["tensor"])  # type: ignore[call-overload]
    sizes = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
    rows = int(model["vocab_size"])  # type: ignore[call-overload]
    return all(int(model[key]) % tensor == 0 for key in sizes) and math.ceil(rows / tensor) * (tensor - 1) < rows  # type: ignore[call-overload]


@given(plans())
def test_a_legal_plan_agrees_and_an_illegal_one_is_refused(plan: tuple[dict[str, object], dict[str, object], int]) -> None:
    model, options, data = plan
    legal = is_legal(model, options)
    # At least half of what is drawn is legal: beyond that, illegal plans are not interesting.
    assume(legal or LEGAL["legal"] * 2 >= LEGAL["drawn"])
    LEGAL["drawn"] += 1
    LEGAL["legal"] += legal
    note(f"legal: {legal}")
    policy = shardcomp.Policy.load("llama", **options)
    world = int(options["tensor"]) * data  # type: ignore[call-overload]
    if not legal:
        try:
            shardcomp.lower(tiny(**model), policy, world, seq=12)
        except ShardError:
            return
        raise AssertionError("a plan that cannot work was lowered")
    found = verify(tiny(**model), policy, world, shrink={"none": True}, kinds=("causal",))
    target(math.log10(max(found.deviation["gradients"], 1e-20)))
    assert found.ok, found
