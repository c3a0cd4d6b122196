"""More tensor-parallel ranks than key-value heads: heads are held in copies, in groups of neighbouring ranks."""

from __future__ import annotations

from typing import Any

import pytest

import shardcomp
from shardcomp.cost.communication import messages
from shardcomp.cost.memory import local_numel
from shardcomp.ir.program import Program
from shardcomp.policy.options import Options
from support.models import tiny


def policy(tensor: int, **options: Any) -> shardcomp.Policy:
    return shardcomp.Policy.load("llama", tensor=tensor, precision="fp64", **options)


def config(heads: int) -> Any:
    return tiny(num_attention_heads=8, num_key_value_heads=heads, hidden_size=64)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_in_copies_agree_with_the_dense_model(heads: int, sequence_parallel: bool) -> None:
    chosen = policy(4, data=1 if sequence_parallel else 2, sequence_parallel=sequence_parallel)
    result = shardcomp.verify(config(heads), chosen, shrink={"none": True})
    assert result.ok, result.worst


@pytest.mark.long  # verification/test_verifier.py does so without copies
def test_every_mutant_of_heads_in_copies_is_noticed() -> None:
    result = shardcomp.verify(config(2), policy(4, data=1, sequence_parallel=True), shrink={"none": True}, mutate=True)
    assert result.ok and result.mutants and not result.mutants["survivors"]


def test_a_rank_holds_one_head_and_sends_no_more_than_where_heads_divide() -> None:
    copied = shardcomp.lower(config(2), policy(4), 4, seq=8).program
    plain = shardcomp.lower(config(4), policy(4), 4, seq=8).program
    name = "model.layers.0.self_attn.k_proj.weight"
    coordinates = {"pp": 0, "dp": 0, "cp": 0, "tp": 1}
    assert local_numel(copied, name, coordinates) == 8 * 64
    assert copied.parameters[name].partial_gradient == ("tp_rep",)

    def sent(program: Program) -> list[tuple[object, ...]]:
        found = messages(program, Options(precision="fp64"), 1, 8, 1, coordinates)
        return [(m.op, m.axis, m.phase, m.count, m.bytes, m.where) for m in found if m.phase != "step"]

    assert sent(copied) == sent(plain)
