"""Predicted messages equal those that a run sends, one by one and to the byte."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

import shardcomp
from shardcomp import presets
from shardcomp.cost.communication import messages
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.policy.options import Options
from shardcomp.runtime.stage import ModelStage
from shardcomp.runtime.unit import StageRoot
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny, with_idle

pytestmark = pytest.mark.usefixtures("chunked_losses")

# method of the process group -> (operation, position of the tensors that are passed in)
METHODS = {
    "allreduce": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
}

Sent = dict[tuple[str, str, str], tuple[int, int]]
"""(operation, axis, phase) -> (count, bytes)."""


class Counted:
    """What each rank's process groups were asked to send, and in which phase: forward inside a stage's call, backward while
    autograd runs or a pipeline's stage sums gradients itself, else the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = threading.local()
        self.found: dict[int, Sent] = {}
        for method, (op, position) in METHODS.items():
            monkeypatch.setattr(ProcessLocalGroup, method, self._collective(getattr(ProcessLocalGroup, method), op, position))
        monkeypatch.setattr(StageRoot, "__call__", self._during("forward", StageRoot.__call__))
        monkeypatch.setattr(ModelStage, "_reduce", self._during("backward", ModelStage._reduce))
        monkeypatch.setattr(ModelStage, "get_fwd_send_ops", self._sends("forward", ModelStage.get_fwd_send_ops))
        monkeypatch.setattr(ModelStage, "get_bwd_send_ops", self._sends("backward", ModelStage.get_bwd_send_ops))

    def start(self, rank: int, coordinates: Callable[[int], dict[str, int]]) -> None:
        """Count what this thread sends from now on. coordinates: where a rank stands on the axes."""
        self.found[rank] = {}
        self.rank.axes = {}
        for group, name in dist.distributed_c10d._world.pg_names.items():
            places = [coordinates(each) for each in dist.get_process_group_ranks(group)]
            across = [axis for axis in places[0] if len({place[axis] for place in places}) > 1]
            self.rank.axes[name] = across[0] if len(across) == 1 else "several"
        self.rank.value, self.rank.phase = rank, "step"

    def stop(self) -> None:
        self.rank.value = None

    def _add(self, op: str, axis: str, phase: str, tensors: Any) -> None:
        passed = [held for held in torch.utils._pytree.tree_leaves(tensors) if isinstance(held, torch.Tensor)]
        count, size = self.found[self.rank.value].get((op, axis, phase), (0, 0))
        size += sum(held.numel() * held.itemsize for held in passed)
        self.found[self.rank.value][op, axis, phase] = count + 1, size

    def _collective(self, true: Any, op: str, position: int) -> Any:
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self.rank, "value", None) is not None and group.size() > 1:
                phase = "backward" if torch._C._current_graph_task_id() != -1 else self.rank.phase
                self._add(op, self.rank.axes[group.pg_name], phase, args[position])
            return true(group, *args, **kwargs)

        return method

    def _sends(self, phase: str, true: Any) -> Any:
        def method(*args: Any) -> Any:
            operations = true(*args)
            if getattr(self.rank, "value", None) is not None:
                for operation in operations:
                    self._add("send", "pp", phase, operation.tensor)
            return operations

        return method

    def _during(self, phase: str, true: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            before, self.rank.phase = getattr(self.rank, "phase", "step"), phase
            try:
                return true(*args, **kwargs)
            finally:
                self.rank.phase = before

        return method


def sent(monkeypatch: pytest.MonkeyPatch, lowered: Lowered, rows: int) -> dict[int, Sent]:
    """What every rank sends in a step on so many samples of each data-parallel rank."""
    mesh = lowered.mesh
    weights, batch = weights_of(lowered), batches(97, rows * mesh.dp, lowered.seq, 0)["causal"]
    counted = Counted(monkeypatch)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights)
        part = {name: held.chunk(mesh.dp)[mesh.coordinates(rank)["dp"]] for name, held in batch.items()}
        for _ in range(2):
            counted.start(rank, mesh.coordinates)
            sharded.train_step(**part)
            counted.stop()

    run_ranks(mesh.world_size, work)
    return counted.found


def predicted(lowered: Lowered, rank: int) -> Sent:
    found: Sent = {}
    for entry in lowered.report(rank)["collectives"]:
        key = entry["op"], entry["axis"], entry["phase"]
        count, size = found.get(key, (0, 0))
        found[key] = count + entry["count"], size + entry["bytes"]
    return found


def compare(monkeypatch: pytest.MonkeyPatch, model: Any, rows: int = 3, **options: Any) -> None:
    """A step on `rows` samples of each data-parallel rank sends, from every rank, what the report says."""
    policy = shardcomp.Policy.load("llama", **{"micro_batch": 1, "data": 2, **options})
    chosen = policy.options
    assert chosen.data and chosen.micro_batch
    lowered = shardcomp.lower(
        model, policy, chosen.ranks, seq=8, micro_batch=chosen.micro_batch, global_batch=rows * chosen.data
    )
    found = sent(monkeypatch, lowered, rows)
    for rank in range(chosen.ranks):
        assert found[rank] == predicted(lowered, rank), f"rank {rank}"


@pytest.mark.grid
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize(("tied", "precision", "sequence_parallel"), [(True, "fp32", False), (False, "bf16", True)])
def test_a_step_sends_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch,
    tensor: int,
    data: int,
    sequence_parallel: bool,
    tied: bool,
    micro_batch: int,
    precision: str,
) -> None:
    config = tiny(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied)
    options = {"sequence_parallel": sequence_parallel, "micro_batch": micro_batch, "precision": precision}
    compare(monkeypatch, config, 2, tensor=tensor, data=data, **options)


# zero, pipeline, schedule, tensor, data, copies of what ZeRO shares, samples of a rank, tied
PLANS = [
    (1, 1, "1f1b", 1, 2, 1, 3, False),
    (2, 1, "1f1b", 2, 2, 1, 3, True),
    (3, 1, "1f1b", 2, 2, 1, 1, False),
    (3, 1, "1f1b", 1, 2, 1, 3, True),
    (1, 1, "1f1b", 1, 4, 2, 3, True),
    (2, 1, "1f1b", 2, 4, 2, 1, False),
    (3, 1, "1f1b", 1, 4, 2, 3, True),
    (3, 1, "1f1b", 1, 4, 4, 3, False),
    (0, 2, "1f1b", 2, 2, 1, 3, True),
    (0, 2, "interleaved", 1, 2, 1, 1, False),
    (0, 2, "zero_bubble", 1, 2, 1, 3, True),
    (0, 2, "zbv", 2, 2, 1, 3, False),
    (1, 2, "1f1b", 1, 2, 1, 1, True),
    (1, 2, "interleaved", 2, 2, 1, 3, True),
    (1, 2, "zero_bubble", 1, 4, 2, 3, False),
    (1, 2, "zbv", 1, 2, 1, 3, True),
    (2, 2, "1f1b", 2, 2, 1, 3, False),
    (2, 2, "interleaved", 1, 2, 1, 3, True),
    (2, 2, "zero_bubble", 2, 2, 1, 1, True),
    (2, 2, "zbv", 1, 4, 2, 3, True),
    (3, 2, "1f1b", 1, 4, 2, 3, True),
    (3, 2, "gpipe", 1, 2, 1, 3, False),
    (3, 2, "interleaved", 2, 2, 1, 3, False),
    (3, 2, "zero_bubble", 1, 2, 1, 3, True),
    (3, 2, "zbv", 2, 2, 1, 3, True),
    (3, 2, "zbv", 1, 2, 1, 1, False),
    (3, 2, "dualpipev", 1, 2, 1, 3, True),
    (3, 4, "1f1b", 1, 2, 1, 3, True),
    (3, 2, "zero_bubble", 2, 1, 1, 3, True),
]


@pytest.mark.grid
@pytest.mark.parametrize(("zero", "pipeline", "schedule", "tensor", "data", "replicate", "rows", "tied"), PLANS)
def test_a_step_sends_what_was_predicted_under_every_zero_stage_and_schedule(
    monkeypatch: pytest.MonkeyPatch,
    zero: int,
    pipeline: int,
    schedule: str,
    tensor: int,
    data: int,
    replicate: int,
    rows: int,
    tied: bool,
) -> None:
    config = tiny(num_hidden_layers=4 if pipeline > 1 else 2, tie_word_embeddings=tied)
    degrees = {"zero": zero, "pipeline": pipeline, "tensor": tensor, "data": data, "replicate": replicate}
    compare(monkeypatch, config, rows, schedule=schedule, **degrees)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.long  # sharding/test_head_copies.py compares their gradients
def test_heads_in_copies_add_up_their_gradients_as_was_predicted(monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    compare(monkeypatch, tiny(num_attention_heads=8), 1, tensor=4, zero=zero)


FIRST = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2")
"""More than the first stage of two."""


@pytest.mark.parametrize(
    ("frozen", "options"),
    [
        (FIRST[:2], {"zero": 3}),
        (FIRST[:2], {"zero": 1}),
        (("model.layers.0.mlp", "model.layers.2", "lm_head"), {"zero": 3, "pipeline": 2, "schedule": "zero_bubble"}),
        (FIRST, {"zero": 3, "pipeline": 2, "schedule": "zbv"}),
        (FIRST, {"zero": 0, "pipeline": 2, "schedule": "zero_bubble"}),
        (("model.layers.3", "model.norm", "lm_head"), {"zero": 2, "pipeline": 2}),
    ],
)
def test_what_is_frozen_is_gathered_where_a_gradient_passes_and_never_summed(
    monkeypatch: pytest.MonkeyPatch, frozen: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = shardcomp.initialize(presets.build(tiny(num_hidden_layers=4)), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    compare(monkeypatch, model, **options)


@pytest.mark.parametrize("options", [{"zero": 1}, {"zero": 3, "tensor": 2}, {"zero": 2, "pipeline": 2, "schedule": "zbv"}])
@pytest.mark.long  # runtime/test_unused_parameters.py has such plans
def test_what_no_call_uses_is_gathered_with_its_unit_and_never_summed(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    compare(monkeypatch, with_idle(), **options)


def per_layer(config: Any, **options: Any) -> Counter[tuple[str, str]]:
    lowered = shardcomp.lower(config, shardcomp.Policy.load("llama", **options), seq=16)
    where = "model.layers.0"
    every = messages(lowered.program, Options(), 1, 16, 1, lowered.mesh.coordinates(0))
    return Counter({(m.op, m.phase): m.count for m in every if m.where == where})


def test_a_layer_sends_the_fewest_messages_that_it_can() -> None:
    assert per_layer(tiny(), tensor=2, sequence_parallel=True) == {
        ("all_gather", "forward"): 2,
        ("reduce_scatter", "forward"): 2,
        ("all_gather", "backward"): 2,
        ("reduce_scatter", "backward"): 2,
    }
    assert per_layer(tiny(), tensor=2, sequence_parallel=False) == {("all_reduce", "forward"): 2, ("all_reduce", "backward"): 2}


def test_the_loss_exchanges_three_numbers_per_token() -> None:
    lowered = shardcomp.lower(
        tiny(), shardcomp.Policy.load("llama", tensor=2, sequence_parallel=False, precision="fp32"), seq=16
    )
    every = messages(lowered.program, Options(), 1, 16, 1, lowered.mesh.coordinates(0))
    [loss] = [m for m in every if m.where == "lm_head" and m.axis == "tp" and m.phase == "forward"]
    assert (loss.op, loss.bytes) == ("all_gather", 3 * 16 * 4)


@pytest.mark.parametrize("recompute", ["full", "selective", "every:2"])
@pytest.mark.parametrize(
    "options",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": False, "precision": "fp32"},
        {"tensor": 2, "pipeline": 2, "zero": 3, "schedule": "zero_bubble"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_computing_again_sends_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], recompute: str
) -> None:
    compare(monkeypatch, tiny(num_hidden_layers=4), recompute=recompute, **options)
