"""Drawn models × topologies × options: a legal plan agrees with the dense model, an illegal one is refused before
anything runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import event, given, note, settings, target
from hypothesis import strategies as st
from models import tiny

import shardcomp
from shardcomp import ShardError
from shardcomp.verifier import verify


@st.composite
def plans(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, object], int]:
    """(changes of the configuration, options, data-parallel ranks). One draw in two fits its degree by construction."""
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


def is_legal(model: dict[str, object], options: dict[str, object]) -> bool:
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
    legal = is_legal(model, options)
    event("legal" if legal else "illegal")
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
