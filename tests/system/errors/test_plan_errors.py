"""Plans that must be refused, each with its message, before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardcomp
from shardcomp import CheckpointError, PlanError, PolicyError, presets
from shardcomp.lowering import PASSES
from shardcomp.materialize import shard, weights_of
from shardcomp.pass_runner import check_order, name_of
from shardcomp.passes import canonicalize, emit, partition_units, tensor_parallel
from support.models import tiny


def lower(config: Any = None, world: int | None = None, seq: int = 16, **options: Any) -> shardcomp.lowering.Lowered:  # type: ignore[name-defined]
    return shardcomp.lower(config or tiny(), shardcomp.Policy.load("llama", **options), world, seq=seq)


def test_heads_that_do_not_divide_name_the_legal_degrees() -> None:
    with pytest.raises(PolicyError, match=r"num_attention_heads = 4 cannot be split over tensor = 8: use 1, 2, 4$"):
        lower(tensor=8)  # the two key-value heads could be held in copies
    with pytest.raises(PolicyError, match=r"num_attention_heads = 6 and num_key_value_heads = 3 .* tensor = 4: use 1, 3"):
        lower(tiny(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=8), tensor=4)


def test_every_weight_that_does_not_divide_is_in_one_message() -> None:
    with pytest.raises(PolicyError) as raised:
        lower(tiny(intermediate_size=50, num_attention_heads=6, num_key_value_heads=3, hidden_size=48), tensor=3, seq=12)
    text = str(raised.value)
    assert all(
        f"mlp.{name}_proj.weight: 50 cannot be split over tensor = 3: use 1, 2, 5" in text for name in ("gate", "up", "down")
    )


def test_a_vocabulary_smaller_than_the_degree_is_refused() -> None:
    config = tiny(vocab_size=9, num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    with pytest.raises(PolicyError, match="9 rows leave a rank of tensor = 8 without any"):
        lower(config, tensor=8)


def test_a_world_that_the_degrees_do_not_divide_is_refused() -> None:
    with pytest.raises(PolicyError, match="tensor = 2 does not divide a world of 3 ranks"):
        lower(tensor=2, world=3)


def test_a_length_that_does_not_divide_names_the_next_legal_one() -> None:
    with pytest.raises(PlanError, match="seq = 15 does not split over tensor = 2: use 14 or 16"):
        lower(tensor=2, seq=15)
    lower(tensor=2, seq=15, sequence_parallel=False)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="a global batch of 3 is not a multiple"):
        shardcomp.lower(tiny(), shardcomp.Policy.load("llama"), 2, seq=16, global_batch=3)


def test_a_policy_of_another_family_says_so() -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=97, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    with pytest.raises(PolicyError, match="family 'llama', but the model's type is 'gpt2'"):
        lower(config, tensor=2)


def test_weights_that_are_partly_on_meta_are_refused() -> None:
    model = presets.build(tiny())
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32))
    with pytest.raises(PlanError, match="are on meta"):
        weights_of(lower(model))


def test_nothing_is_started_when_a_plan_is_refused(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError):
        shard(presets.build(tiny()), shardcomp.Policy.load("llama", precision="fp32"), checkpoint=tmp_path / "nowhere")
    with pytest.raises(PolicyError):
        shard(presets.build(tiny()), shardcomp.Policy.load("llama", tensor=2))
    assert not dist.is_initialized()


def test_passes_in_an_impossible_order_are_refused_before_any_runs() -> None:
    with pytest.raises(PlanError, match="partition_units needs canonical"):
        check_order([partition_units, canonicalize, tensor_parallel, emit])


def test_a_pass_or_rank_that_does_not_exist_is_named() -> None:
    lowered = lower()
    named = ", ".join(["capture", *map(name_of, PASSES)])
    with pytest.raises(PlanError, match=f"there are {named}"):
        lowered.listing(after="fuse")
    with pytest.raises(PlanError, match="rank 7"):
        lowered.listing(rank=7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pipeline": 4}, r"pipeline = 4 makes 4 stages, but the model has 3 layers .* use pipeline = 1, 2, 3$"),
        (
            {"pipeline": 2, "schedule": "interleaved"},
            r"pipeline × virtual_stages = 2 × 2 .* use virtual_stages = 1, or pipeline = 1 without virtual_stages$",
        ),
        ({"pipeline": 2, "schedule": "zbv"}, r"2 × 2 makes 4 stages, but .* use pipeline = 1, or schedule = 1f1b$"),
        ({"pipeline": 2, "stage_layers": (1, 3)}, r"stage_layers = 1,3 makes 4 layers, but the model has 3: .* add up to 3$"),
    ],
)
def test_a_pipeline_that_the_layers_do_not_fill_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        lower(tiny(num_hidden_layers=3), **options)


def test_the_layers_of_a_single_stage_are_checked_as_well() -> None:
    policy = shardcomp.Policy.load("llama", stage_layers=(3,))
    with pytest.raises(PlanError, match="stage_layers = 3 makes 3 layers, but the model has 2"):
        shardcomp.lower(tiny(), policy)
