"""The discipline of steps: gradients that add up, steps that are skipped, evaluation, under ZeRO and pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import shardcomp
from shardcomp import presets
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.fsdp import finish_unreduced_grads
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.gradients import local
from shardcomp.runtime.loss_scale import LossScale
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.dense_model import batches, dense
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.models import tiny

Batch = dict[str, Tensor]


def lowered_for(tied: bool = False, pipeline: int = 1, **options: Any) -> Lowered:
    config = tiny(tie_word_embeddings=tied, num_hidden_layers=4 if pipeline > 1 else 2)
    policy = shardcomp.Policy.load("llama", **{"precision": "fp64", "micro_batch": 2, "pipeline": pipeline, **options})
    lowered = shardcomp.lower(initialize(presets.build(config), 0), policy, seq=8)
    for inputs in ({"input_ids", "labels"}, {"input_ids", "labels", "attention_mask"}):  # tracing is not for threads
        lowered.for_call((tuple(sorted((name, 2) for name in inputs)), ("loss",), True), (2, 8))
    return lowered


def part(batch: Batch, sharded: ShardedModel) -> Batch:
    size, rank = sharded.mesh["dp"].size(), sharded.mesh.get_local_rank("dp")
    return {name: held.chunk(size)[rank] for name, held in batch.items()}


def gradients(sharded: ShardedModel) -> dict[str, Tensor]:
    return {name: local(p.grad).clone() for name, p in sharded.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, held in wanted.items():
        torch.testing.assert_close(found[name], held, rtol=1e-10, atol=1e-13, msg=name)


PLANS: list[dict[str, Any]] = [
    *({"zero": zero, "data": 2, "tied": zero % 2 == 1} for zero in range(4)),
    {"zero": 3, "tensor": 2, "data": 2, "tied": True},
    {"zero": 0, "tensor": 2},
    {"zero": 1, "data": 2, "pipeline": 2, "tied": True},
    {"zero": 2, "data": 2, "pipeline": 2, "schedule": "interleaved", "tied": True},
    {"zero": 3, "data": 2, "pipeline": 2, "schedule": "zero_bubble", "tied": True},
    {"zero": 1, "tensor": 2, "data": 2, "pipeline": 2, "schedule": "zbv", "tied": True},
    {"zero": 0, "tensor": 2, "pipeline": 2, "tied": True},
    {"zero": 3, "data": 4, "replicate": 2, "pipeline": 2, "recompute": "full", "tied": True},
]
each_plan = pytest.mark.parametrize("options", PLANS, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))


@pytest.mark.grid
@each_plan
def test_gradients_of_steps_add_up_whatever_came_between(options: dict[str, Any]) -> None:
    lowered = lowered_for(**options)
    dp = lowered.mesh.dp
    first = batches(97, 3 * dp, 8, 0)["causal"]  # a last micro-batch of one sample
    others = [batches(97, 5 * dp, 12, 1)["causal"], batches(97, 2 * dp, 8, 2)["padded"], batches(97, dp, 16, 3)["causal"]]
    exact = dense(lowered.model, "fp64", {"causal": first}, []).gradients["causal"]
    names = lowered.program.canonical_names()

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        sharded.train_step(**part(first, sharded))
        for name, p in sharded.named_parameters():
            wanted = exact[names.get(name, name)]
            torch.testing.assert_close(full_tensor(p.grad), wanted, rtol=1e-9, atol=1e-12, msg=name)
        alone = []
        for batch in (first, *others):
            sharded.zero_grad()
            sharded.train_step(**part(batch, sharded))
            alone.append(gradients(sharded))
        sharded.zero_grad()
        for batch in (first, *others):
            sharded.train_step(**part(batch, sharded))
        close(gradients(sharded), {name: sum(each[name] for each in alone) for name in alone[0]})

    run_ranks(lowered.mesh.world_size, work)


@pytest.mark.parametrize("options", PLANS[3:10:2], ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()))
def test_evaluation_gives_the_loss_of_training_and_leaves_gradients_alone(options: dict[str, Any]) -> None:
    lowered = lowered_for(**options)
    dp = lowered.mesh.dp
    given = [batches(97, rows * dp, length, rows)["causal"] for rows, length in ((3, 8), (4, 12), (1, 8))]
    exact = dense(lowered.model, "fp64", {"causal": given[0]}, [])
    lowered.for_call(((("input_ids", 2), ("labels", 2)), ("loss", "logits"), True), (2, 8))

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        losses = [sharded.train_step(**part(batch, sharded)) for batch in given]
        before = gradients(sharded)
        for batch, step in zip(given, losses, strict=True):
            found = sharded.eval_step(**part(batch, sharded))
            assert torch.equal(found.tokens, step.tokens) and not found.skipped
            torch.testing.assert_close(found.loss, step.loss, rtol=1e-12, atol=0)
            assert found.logits is None
        found = sharded.eval_step(**part(given[0], sharded), return_logits=True)
        torch.testing.assert_close(found.loss, losses[0].loss, rtol=1e-12, atol=0)
        if found.logits is not None:
            logits = found.logits.full_tensor() if isinstance(found.logits, DTensor) else found.logits
            wanted = exact.logits.chunk(dp)[sharded.mesh.get_local_rank("dp")]
            torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-11)
        have = [None] * lowered.mesh.world_size
        torch.distributed.all_gather_object(have, found.logits is not None)
        assert sum(map(bool, have)) == lowered.mesh.world_size // lowered.mesh.pp
        for name, held in gradients(sharded).items():
            assert torch.equal(held, before[name]), name

    run_ranks(lowered.mesh.world_size, work)


@pytest.mark.parametrize("options", [{"zero": 1, "data": 2}, {"zero": 2, "data": 2, "pipeline": 2, "schedule": "zero_bubble"}])
def test_a_loss_scale_changes_no_bit_of_the_gradients(options: dict[str, Any]) -> None:
    lowered = lowered_for(tied=True, **{**options, "precision": "fp32"})
    batch = batches(97, 3 * lowered.mesh.dp, 8, 0)["causal"]

    def work(rank: int) -> None:
        plain, scaled = allocate(lowered, weights_of(lowered)), allocate(lowered, weights_of(lowered))
        scaled.loss_scale = LossScale(enabled=True, initial=2.0**12)
        for _ in range(2):  # the second adds to gradients that stand
            losses = [model.train_step(**part(batch, model)).loss for model in (plain, scaled)]
            assert torch.equal(*losses)
        if lowered.mesh.pp == 1:
            for model in (plain, scaled):
                model(**part(batch, model)).loss.backward()
        wanted = gradients(plain)
        for name, held in gradients(scaled).items():
            assert torch.equal(held, wanted[name]), name

    run_ranks(lowered.mesh.world_size, work)


def plant(sharded: ShardedModel, value: float) -> Callable[[], None]:
    """Have every backward from now on leave `value` in a gradient of this rank; returns what ends that."""
    true = sharded._passes.end

    def planted() -> Tensor:
        for chunk in sharded._stage_shards:
            finish_unreduced_grads(chunk)
        piece = next(local(p.grad) for p in sharded.parameters() if p.grad is not None and local(p.grad).numel())
        piece.view(-1)[0] = value
        return true()

    sharded._passes.end = planted  # type: ignore[method-assign]
    return lambda: object.__delattr__(sharded._passes, "end")


SKIPPING: list[dict[str, Any]] = [
    {"zero": 1, "data": 2},
    {"zero": 0, "tensor": 2},
    {"zero": 3, "data": 2, "pipeline": 2, "tied": True},
    {"zero": 2, "tensor": 2, "data": 2, "pipeline": 2, "schedule": "zbv"},
]


@pytest.mark.parametrize(
    ("kind", "options", "precision"),
    [
        *((shardcomp.AdamW, options, precision) for options in SKIPPING for precision in ("fp16", "bf16")),
        (torch.optim.AdamW, SKIPPING[0], "fp16"),
        (torch.optim.AdamW, SKIPPING[3], "bf16"),
    ],
    ids=lambda each: getattr(each, "__module__", str(each)),
)
def test_a_gradient_that_is_not_finite_on_one_rank_makes_every_rank_skip(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], precision: str
) -> None:
    lowered = lowered_for(**{**options, "precision": precision})
    batch = batches(97, 2 * lowered.mesh.dp, 8, 0)["causal"]
    last = lowered.mesh.world_size - 1
    fp16 = precision == "fp16"

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        sharded.loss_scale = LossScale(enabled=fp16, initial=2.0**8, interval=2)
        start = sharded.loss_scale.scale
        mine = part(batch, sharded)
        optimizer = kind(sharded.parameters(), lr=0.1)  # type: ignore[call-arg]

        def step(bad: bool, stands: bool = False) -> None:
            end = plant(sharded, float("inf") if fp16 else float("nan")) if bad and rank == last else None
            found = sharded.train_step(**mine)
            if end:
                end()
            assert bool(found.skipped) == (bad or stands) and found.loss.isfinite()

        def weights() -> list[Tensor]:
            return [local(p.detach()).clone() for p in sharded.parameters()]

        before = weights()
        step(bad=True)
        assert not sharded.optimizer_step(optimizer) and sharded.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        assert not any(state["step"] for state in optimizer.state.values())
        assert sharded.loss_scale.scale == (start / 2 if fp16 else 1.0)
        optimizer.zero_grad()

        for order in ((True, False), (False, True)):  # one of two steps whose gradients add up
            step(order[0])
            step(order[1], stands=order[0])  # a bad gradient spoils what is added to it
            assert not sharded.optimizer_step(optimizer)
            optimizer.zero_grad()
        assert sharded.skipped_steps == 3 and sharded.loss_scale.scale == (start / 8 if fp16 else 1.0)

        for _ in range(2):
            step(bad=False)
            assert sharded.optimizer_step(optimizer)
            optimizer.zero_grad()
        assert sharded.loss_scale.scale == (start / 4 if fp16 else 1.0)  # after two good ones
        assert sharded.skipped_steps == 3
        changed = [not torch.equal(a, b) for a, b in zip(before, weights(), strict=True) if a.numel()]
        assert all(changed) and all(held.isfinite().all() for held in weights())

        if lowered.mesh.pp == 1:
            end = plant(sharded, float("inf")) if rank == last else None
            sharded(**mine).loss.backward()
            if end:
                end()
            assert not sharded.optimizer_step(optimizer) and sharded.skipped_steps == 4
            optimizer.zero_grad()
            sharded(**mine).loss.backward()
            assert sharded.optimizer_step(optimizer)

    run_ranks(lowered.mesh.world_size, work)


@pytest.mark.parametrize("options", [{"zero": 2, "data": 2}, {"zero": 1, "pipeline": 2, "data": 1}])
def test_a_loss_scale_that_is_too_large_comes_down_until_steps_are_made(options: dict[str, Any]) -> None:
    lowered = lowered_for(**{**options, "precision": "fp16"})
    batch = batches(97, 2 * lowered.mesh.dp, 8, 0)["causal"]

    def work(rank: int) -> float:
        sharded = allocate(lowered, weights_of(lowered))
        sharded.loss_scale = LossScale(enabled=True, initial=2.0**24)
        optimizer = shardcomp.AdamW(sharded.parameters(), lr=1e-3)
        tries = 0
        while not sharded.train_step(**part(batch, sharded)) or not sharded.optimizer_step(optimizer):
            optimizer.zero_grad()
            tries += 1
        assert 0 < tries < 24 and sharded.skipped_steps == tries
        return sharded.loss_scale.scale

    assert len(set(run_ranks(lowered.mesh.world_size, work))) == 1


def test_a_loss_scale_goes_on_from_its_state() -> None:
    scale = LossScale(enabled=True, initial=8.0, interval=3)
    for skipped in (False, False, True, False, False):
        scale.update(skipped)
    again = LossScale(enabled=True, interval=3)
    again.load_state_dict(scale.state_dict())
    assert (again.scale, again.good_steps) == (4.0, 2)
    again.update(False)
    assert (again.scale, again.good_steps) == (8.0, 0)


@pytest.mark.parametrize("options", [{"zero": 1, "data": 2}, {"zero": 3, "data": 2}, {"zero": 0, "tensor": 2}])
def test_one_backward_of_two_losses_is_scaled_once_and_gathers_what_it_needs(options: dict[str, Any]) -> None:
    lowered = lowered_for(tied=True, **{**options, "precision": "fp32"})
    given = [batches(97, lowered.mesh.dp, length, length)["causal"] for length in (8, 12)]

    def work(rank: int) -> None:
        apart, together = allocate(lowered, weights_of(lowered)), allocate(lowered, weights_of(lowered))
        together.loss_scale = LossScale(enabled=True, initial=2.0**12)
        for _ in range(2):
            for batch in given:
                apart(**part(batch, apart)).loss.backward()
            losses = [together(**part(batch, together)).loss for batch in given]
            sum(losses[1:], losses[0]).backward()
        wanted = gradients(apart)
        for name, held in gradients(together).items():
            torch.testing.assert_close(held, wanted[name], rtol=1e-5, atol=1e-7, msg=name)
        assert together.optimizer_step(torch.optim.SGD(together.parameters(), lr=0.1))

    run_ranks(lowered.mesh.world_size, work)


FAILURES = [
    *((where, {"zero": zero, "data": 2, "tied": zero > 1}) for where in ("forward", "backward") for zero in range(4)),
    ("backward", {"zero": 3, "tensor": 2, "data": 2}),
]


@pytest.mark.grid
@pytest.mark.parametrize(("where", "options"), FAILURES, ids=str)
def test_a_step_behind_one_that_failed_is_as_on_a_fresh_model(where: str, options: dict[str, Any]) -> None:
    lowered = lowered_for(**options, recompute="full" if where == "backward" else "none")
    good = batches(97, 4 * lowered.mesh.dp, 8, 0)["causal"]

    def work(rank: int) -> None:
        fresh, used = allocate(lowered, weights_of(lowered)), allocate(lowered, weights_of(lowered))
        used.train_step(**part(good, used))  # gradients stand
        mine = part(good, used)

        def fail(gradient: Tensor) -> None:
            raise ValueError(f"in a {where}")

        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen.append(module)
            if len(seen) == 2:  # of the second micro-batch
                output.register_hook(fail) if where == "backward" else fail(output)

        seen: list[Any] = []
        handle = used._stage_shards[0].unit_parameters[1].register_forward_hook(hook)
        with pytest.raises(ValueError, match=f"in a {where}"):
            used.train_step(**mine)
        handle.remove()
        assert not gradients(used)
        held = used.held_bytes()
        assert held["device"]["gathered"] == held["device"]["unreduced"] == 0
        losses = [model.train_step(**part(good, model)).loss for model in (fresh, used)]
        assert torch.equal(*losses)
        wanted = gradients(fresh)
        for name, gradient in gradients(used).items():
            assert torch.equal(gradient, wanted[name]), name

    run_ranks(lowered.mesh.world_size, work)


@pytest.mark.long  # the steps above add up whatever came between
def test_frozen_stages_and_evaluation_leave_nothing_behind() -> None:
    model = initialize(presets.build(tiny(num_hidden_layers=4)), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.embed_tokens", *(f"model.layers.{i}." for i in range(3)))))
    policy = shardcomp.Policy.load("llama", precision="fp32", pipeline=2, data=2, zero=3, micro_batch=2)
    lowered = shardcomp.lower(model, policy, seq=8)
    batch = batches(97, 4, 8, 0)["causal"]

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        for step in (sharded.train_step, sharded.eval_step):
            for _ in range(2):
                step(**part(batch, sharded))
                [chunk] = sharded._stage_shards
                assert not chunk.root._get_fsdp_state()._comm_ctx.post_forward_order

    run_ranks(4, work)
