"""Predicted messages equal those that a run sends, one by one and to the byte."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from models import tiny
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup

import shardcomp
from shardcomp.cost.communication import messages
from shardcomp.ranks import run_ranks
from shardcomp.reference import batches
from shardcomp.sharding import allocate, weights_of

# method of the process group -> (operation, position of the tensors that are passed in)
METHODS = {
    "allreduce": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
}


class Counted:
    """What each rank's process groups were asked to send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank = threading.local()
        self.found: dict[int, Counter[tuple[str, str, str]]] = {}
        self.bytes: dict[int, Counter[tuple[str, str, str]]] = {}
        for method, (op, position) in METHODS.items():
            monkeypatch.setattr(ProcessLocalGroup, method, self._wrap(getattr(ProcessLocalGroup, method), op, position))

    def start(self, rank: int, groups: dict[str, str]) -> None:
        self.rank.value, self.rank.groups, self.rank.phase = rank, groups, "step"
        self.found[rank], self.bytes[rank] = Counter(), Counter()

    def stop(self) -> None:
        self.rank.value = None

    def _wrap(self, true: Any, op: str, position: int) -> Any:
        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            rank = getattr(self.rank, "value", None)
            if rank is not None and group.size() > 1:
                passed = torch.utils._pytree.tree_leaves(args[position])
                phase = "backward" if torch._C._current_graph_task_id() != -1 else self.rank.phase
                key = (op, self.rank.groups[group.pg_name], phase)
                self.found[rank][key] += 1
                self.bytes[rank][key] += sum(t.numel() * t.itemsize for t in passed if isinstance(t, torch.Tensor))
            return true(group, *args, **kwargs)

        return method


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize(("tied", "precision"), [(True, "fp32"), (False, "bf16")])
def test_a_step_sends_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch,
    tensor: int,
    data: int,
    sequence_parallel: bool,
    tied: bool,
    micro_batch: int,
    precision: str,
) -> None:
    options = {"tensor": tensor, "sequence_parallel": sequence_parallel, "micro_batch": micro_batch, "precision": precision}
    policy = shardcomp.Policy.load("llama", **options)
    config = tiny(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied)
    lowered = shardcomp.lower(config, policy, tensor * data, seq=16, micro_batch=micro_batch, global_batch=2 * data)
    weights, batch = weights_of(lowered), batches(97, 2 * data, 16, 0)["causal"]
    counted = Counted(monkeypatch)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights)
        axes = {axis.group.pg_name: name for name, axis in sharded._axes.items() if axis.group is not None}
        part = {name: held.chunk(data)[sharded.mesh.get_local_rank("dp")] for name, held in batch.items()}
        sharded.train_step(**part)  # FSDP sets itself up on the first step

        def phase(name: str) -> Any:
            return lambda *_: setattr(counted.rank, "phase", name)

        sharded._root.register_forward_pre_hook(phase("forward"), prepend=True)
        sharded._root.register_forward_hook(phase("step"))
        counted.start(rank, axes)
        sharded.train_step(**part)
        counted.stop()

    run_ranks(tensor * data, work)
    for rank in range(tensor * data):
        count: Counter[tuple[str, str, str]] = Counter()
        size: Counter[tuple[str, str, str]] = Counter()
        master = torch.float32
        for m in messages(lowered.program, master, micro_batch, 16, 2 // micro_batch, lowered.mesh.coordinates(rank)):
            count[m.op, m.axis, m.phase] += m.count
            size[m.op, m.axis, m.phase] += m.bytes
        assert counted.found[rank] == count
        assert counted.bytes[rank] == size


def per_layer(config: Any, **options: Any) -> Counter[tuple[str, str]]:
    lowered = shardcomp.lower(config, shardcomp.Policy.load("llama", **options), seq=16)
    where = "model.layers.0"
    every = messages(lowered.program, torch.float32, 1, 16, 1, lowered.mesh.coordinates(0))
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
    every = messages(lowered.program, torch.float32, 1, 16, 1, lowered.mesh.coordinates(0))
    [loss] = [m for m in every if m.where == "lm_head" and m.axis == "tp" and m.phase == "forward"]
    assert (loss.op, loss.bytes) == ("all_gather", 3 * 16 * 4)
