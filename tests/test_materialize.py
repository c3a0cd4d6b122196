"""What a user does with a sharded model: HuggingFace's names and outputs, gradients that add up, frozen parameters, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import shardcomp
from shardcomp import PlanError, presets
from shardcomp.materialize import allocate, shard, weights_of
from shardcomp.verification.dense_model import batches, dense
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.models import tiny

OPTIONS: dict[str, Any] = {"tensor": 2, "precision": "fp64"}


def policy(**options: Any) -> shardcomp.Policy:
    return shardcomp.Policy.load("llama", **{**OPTIONS, **options})


def part(batch: dict[str, torch.Tensor], sharded: Any) -> dict[str, torch.Tensor]:
    size, rank = sharded.mesh["dp"].size(), sharded.mesh.get_local_rank("dp")
    return {name: held.chunk(size)[rank] for name, held in batch.items()}


def full(held: Any) -> torch.Tensor:
    return (held.full_tensor() if isinstance(held, DTensor) else held).detach().clone()


def test_parameters_have_huggingfaces_names_shapes_and_are_dtensors() -> None:
    model = presets.build(tiny())
    lowered = shardcomp.lower(model, policy(), 4, seq=8)

    def work(rank: int) -> tuple[dict[str, Any], list[str]]:
        sharded = allocate(lowered, weights_of(lowered))
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        state = get_model_state_dict(sharded)
        return {name: tuple(p.shape) for name, p in sharded.named_parameters()}, sorted(state)

    shapes, state = run_ranks(4, work)[0]
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert state == sorted(model.state_dict())


def test_the_local_rows_of_a_vocabulary_that_does_not_divide_follow_torch_chunk() -> None:
    lowered = shardcomp.lower(tiny(vocab_size=11, num_key_value_heads=4), policy(tensor=4), 4, seq=8)

    def work(rank: int) -> int:
        return allocate(lowered, weights_of(lowered)).get_parameter("lm_head.weight").to_local().shape[0]

    assert run_ranks(4, work) == [len(piece) for piece in torch.arange(11).chunk(4)]


def test_the_forward_returns_the_models_output_type_and_backward_every_gradient() -> None:
    model = initialize(presets.build(tiny()), 0)
    batch = batches(97, 4, 8, 0)["causal"]
    expected = dense(model, "fp64", {"causal": batch}, [])
    lowered = shardcomp.lower(model, policy(), 4, seq=8)

    def work(rank: int) -> tuple[Any, dict[str, torch.Tensor]]:
        sharded = allocate(lowered, weights_of(lowered))
        out = sharded(**part(batch, sharded))
        assert isinstance(out, CausalLMOutputWithPast) and out.logits is None
        out.loss.backward()
        once = {name: full(p.grad) for name, p in sharded.named_parameters()}
        sharded(**part(batch, sharded)).loss.backward()
        for name, p in sharded.named_parameters():
            torch.testing.assert_close(full(p.grad), 2 * once[name], rtol=1e-12, atol=0)
        return out.loss.detach(), once

    # Tracing happens on first use; here for all ranks at once.
    for loss, gradients in run_ranks(4, work):
        torch.testing.assert_close(loss, expected.loss["causal"], rtol=1e-12, atol=0)
        for name, gradient in expected.gradients["causal"].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_micro_batches_by_hand_add_up_with_the_count_of_the_whole_batch() -> None:
    lowered = shardcomp.lower(tiny(), policy(), 2, seq=8)
    batch = batches(97, 4, 8, 0)["causal"]

    def work(rank: int) -> None:
        weights = weights_of(lowered)
        whole, pieces = allocate(lowered, weights), allocate(lowered, weights)
        step = whole.train_step(**batch)
        for i in range(4):
            rows = {name: held[i : i + 1] for name, held in batch.items()}
            pieces(**rows, num_items_in_batch=step.tokens).loss.backward()
        for (name, a), b in zip(whole.named_parameters(), pieces.parameters(), strict=True):
            torch.testing.assert_close(full(a.grad), full(b.grad), rtol=1e-11, atol=1e-14, msg=name)

    run_ranks(2, work)


def test_logits_are_split_on_the_vocabulary_and_never_padded() -> None:
    model = initialize(presets.build(tiny()), 0)
    ids = batches(97, 2, 8, 0)["causal"]["input_ids"]
    lowered = shardcomp.lower(model, policy(), 2, seq=8)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        with torch.no_grad():
            logits = sharded(input_ids=ids).logits
        assert isinstance(logits, DTensor) and logits.shape == (2, 8, 97)
        assert logits.to_local().shape[2] == (49, 48)[rank]
        both = sharded(input_ids=ids, labels=ids, return_logits=True)
        torch.testing.assert_close(both.logits.full_tensor(), logits.full_tensor())
        assert both.loss is not None

    run_ranks(2, work)


def test_frozen_parameters_stay_frozen_and_the_others_learn_the_same() -> None:
    def frozen(model: torch.nn.Module) -> torch.nn.Module:
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" not in name and "embed" not in name and "layers.0.input_layernorm" not in name)
        return model

    model = frozen(initialize(presets.build(tiny()), 0))
    batch = batches(97, 4, 8, 0)["causal"]
    expected = dense(model, "fp64", {"causal": batch}, []).gradients["causal"]
    for sequence_parallel in (True, False):
        lowered = shardcomp.lower(model, policy(sequence_parallel=sequence_parallel), 4, seq=8)

        def work(rank: int, lowered: Any = lowered) -> dict[str, torch.Tensor]:
            sharded = allocate(lowered, weights_of(lowered))
            sharded.train_step(**part(batch, sharded))
            return {name: full(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}

        found = run_ranks(4, work)[0]
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_clipping_scales_every_gradient_and_counts_tied_weights_once() -> None:
    model = initialize(presets.build(tiny(tie_word_embeddings=True)), 0)
    batch = batches(97, 4, 8, 0)["causal"]
    expected = dense(model, "fp64", {"causal": batch}, []).norm["causal"]
    lowered = shardcomp.lower(model, policy(), 4, seq=8)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        sharded = allocate(lowered, weights_of(lowered))
        sharded.train_step(**part(batch, sharded))
        return sharded.clip_grad_norm_(0.01), sharded.clip_grad_norm_(1e9)

    for before, after in run_ranks(4, work):
        torch.testing.assert_close(before, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(after, torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_loads_into_plain_transformers_bit_for_bit_and_back(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny(tie_word_embeddings=tied))
    lowered = shardcomp.lower(model, policy(precision="fp32"), 4, seq=8)
    run_ranks(4, lambda rank: allocate(lowered, weights_of(lowered)).save_pretrained(tmp_path / "saved", max_shard_size=20_000))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, held in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], held), name

    other = shardcomp.lower(presets.build(tiny(tie_word_embeddings=tied)), policy(tensor=1, precision="fp32"), 1, seq=8)
    weights = weights_of(other, tmp_path / "saved")

    def load(rank: int) -> dict[str, torch.Tensor]:
        return {name: full(p) for name, p in allocate(other, weights).named_parameters()}

    for name, held in run_ranks(1, load)[0].items():
        assert torch.equal(held, model.get_parameter(name)), name


def test_the_callers_model_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny()).eval()
    state = {name: held.clone() for name, held in model.state_dict().items()}
    config = model.config.to_dict()
    attention = model.config._attn_implementation

    def work(rank: int) -> None:
        sharded = shard(model, policy(tensor=1, precision="fp32"))
        sharded.train_step(**batches(97, 2, 8, 0)["causal"])
        torch.optim.AdamW(sharded.parameters()).step()

    run_ranks(1, work)
    assert all(torch.equal(model.state_dict()[name], held) for name, held in state.items())
    assert model.config.to_dict() == config and model.config._attn_implementation == attention
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_initial_weights_are_the_same_numbers_on_every_topology() -> None:
    expected = dict(initialize(presets.build(tiny()), 3).named_parameters())
    for tensor, world in ((1, 1), (2, 2), (2, 4)):
        lowered = shardcomp.lower(presets.build(tiny()), policy(tensor=tensor, precision="bf16", seed=3), world, seq=8)

        def work(rank: int, lowered: Any = lowered) -> dict[str, torch.Tensor]:
            return {name: full(p) for name, p in allocate(lowered, weights_of(lowered)).named_parameters()}

        for name, held in run_ranks(world, work)[0].items():
            assert torch.equal(held, expected[name]), (tensor, world, name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda sharded: sharded.train_step(
                input_ids=torch.ones(2, 7, dtype=torch.long), labels=torch.ones(2, 7, dtype=torch.long)
            ),
            "length that does is 8",
        ),
        (lambda sharded: sharded.train_step(input_ids=torch.ones(2, 8, dtype=torch.long)), "labels"),
        (
            lambda sharded: sharded.train_step(
                input_ids=torch.ones(2, 8, dtype=torch.long), labels=torch.ones(2, 6, dtype=torch.long)
            ),
            "share batch and length",
        ),
        (lambda sharded: sharded(), "no inputs"),
        (lambda sharded: sharded(input_ids=[[1, 2]]), "must be tensors"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_the_forward(call: Any, message: str) -> None:
    lowered = shardcomp.lower(tiny(), policy(micro_batch=2), 2, seq=8)

    def work(rank: int) -> None:
        call(allocate(lowered, weights_of(lowered)))

    with pytest.raises(PlanError, match=message):
        run_ranks(2, work)


def test_an_optimizer_made_after_a_forward_holds_the_parameters_themselves() -> None:
    lowered = shardcomp.lower(tiny(), policy(precision="bf16"), 2, seq=8)
    batch = batches(97, 2, 8, 0)["causal"]

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        expected = dict(sharded.named_parameters())
        with torch.no_grad():
            sharded(input_ids=batch["input_ids"])
        loss = sharded(**batch).loss
        assert all(p is expected[name] for name, p in sharded.named_parameters())
        assert all(held.dtype == torch.float32 for held in sharded.state_dict().values())
        loss.backward()
        assert all(p.grad is not None for p in expected.values())

    run_ranks(2, work)


def test_one_backward_through_two_calls_of_different_signatures_adds_up_once() -> None:
    lowered = shardcomp.lower(tiny(), policy(), 2, seq=8)
    kinds = batches(97, 2, 8, 0)

    def work(rank: int) -> None:
        apart, together = allocate(lowered, weights_of(lowered)), allocate(lowered, weights_of(lowered))
        for kind in ("causal", "padded"):
            apart(**kinds[kind]).loss.backward()
        (together(**kinds["causal"]).loss + together(**kinds["padded"]).loss).backward()
        for (name, a), b in zip(apart.named_parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(full(b.grad), full(a.grad), rtol=1e-10, atol=1e-13, msg=name)

    run_ranks(2, work)
