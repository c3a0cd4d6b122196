"""What a rank should hold, by DESIGN's table and by parameter, and samples of what it does hold; for tests and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardcomp.runtime.model import ShardedModel

Held = dict[str, dict[str, int]]


@dataclass
class Progress:
    """How far a stage is in a step: forwards and backwards made, of how many micro-batches."""

    forwards: int = 0
    backwards: int = 0
    count: int = 0


@dataclass
class Sample:
    """What a rank held at one moment, and how far its stages were."""

    held: Held
    progress: dict[int, Progress] = field(default_factory=dict)

    def total(self) -> int:
        return sum(sum(held.values()) for held in self.held.values())


def samples_of_a_step(sharded: ShardedModel, optimizer: Any, batch: dict[str, Tensor]) -> list[Sample]:
    """A step, and what was held behind each backward of a micro-batch."""
    found: list[Sample] = []
    progress = {chunk.index: Progress() for chunk in sharded._stage_shards}

    def sample() -> None:
        now = {index: Progress(p.forwards, p.backwards, p.count) for index, p in progress.items()}
        found.append(Sample(sharded.held_bytes(optimizer), now))

    whole = sharded._steps.backward

    def backward(code: Any, piece: Any, scale: float, last: bool) -> Tensor:
        loss = whole(code, piece, scale, last)
        at = progress[0]
        at.forwards, at.backwards = at.forwards + 1, at.backwards + 1
        at.count = at.backwards if last else at.backwards + 1
        sample()
        return loss

    sharded._steps.backward = backward  # type: ignore[method-assign]
    stages = [stage for code in sharded._calls.loaded.values() if code.pipeline for stage in code.pipeline.stages]
    for stage in stages:
        _watch(stage, progress[stage.stage_index], sample)
    sharded.train_step(**batch)
    del sharded._steps.backward
    for stage in stages:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            stage.__dict__.pop(name)
    return found


def _watch(stage: Any, at: Progress, sample: Callable[[], None]) -> None:
    def wrap(name: str, after: Callable[[], None]) -> None:
        original = getattr(stage, name)

        def call(index: int, *args: Any, **kwargs: Any) -> Any:
            result = original(index, *args, **kwargs)
            at.count, at.backwards = stage.count, stage.backwards
            if index < stage.count:
                after()
            return result

        setattr(stage, name, call)

    def forward() -> None:
        at.forwards += 1

    wrap("forward_one_chunk", forward)
    wrap("backward_one_chunk", sample)
    wrap("backward_weight_one_chunk", sample)


def gathered_at_units(sharded: ShardedModel, step: Callable[[], Any]) -> list[int]:
    """Run `step`; the bytes of gathered copies on the device in every unit's forward and at the start of its backward."""
    found: list[int] = []

    def sample(*_: Any) -> None:
        found.append(sharded.held_bytes()["device"]["gathered"])

    def forward(module: nn.Module, inputs: Any, output: Any) -> None:
        for held in _tensors(output):
            if held.requires_grad:
                held.register_hook(sample)

    homes = [home for chunk in sharded._stage_shards for home in chunk.unit_parameters]
    handles = [home.register_forward_pre_hook(sample) for home in homes]
    # The innermost call of a unit: behind every hook that gathers.
    handles += [(home.shared or home).register_forward_hook(forward) for home in homes]
    step()
    for handle in handles:
        handle.remove()
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (each for held in output.values() for each in _tensors(held))
    elif isinstance(output, (tuple, list)):
        yield from (each for held in output for each in _tensors(held))


def unit_bytes(sharded: ShardedModel) -> list[int]:
    """The bytes of each unit's gathered parameters in the compute dtype of 16 bits, padded."""
    shards = _shards(sharded)
    return [
        sum(2 * _padded(shape, shards) for shape in (sharded._blueprint.parameters[n].shape for n in unit.parameters.values()))
        for unit in sharded._blueprint.units
    ]


def expected(sharded: ShardedModel, progress: dict[int, Progress]) -> dict[str, int]:
    """By DESIGN's table for bf16 and masters of float32, exact for every parameter, without tensor parallelism."""
    zero, shards = sharded._blueprint.zero, _shards(sharded)
    rank = sharded.mesh.get_local_rank("dp") if zero else 0
    found = dict.fromkeys(("parameters", "gathered", "unreduced", "gradients", "optimizer"), 0)
    for chunk in sharded._stage_shards:
        at = progress[chunk.index]
        finished = at.backwards == at.count and at.count > 0
        reduced = at.backwards > 0 if zero >= 2 else finished
        for name in chunk.names:
            shape = sharded._blueprint.parameters[name].shape
            share = _padded(shape, shards) // shards
            found["parameters"] += 4 * share
            found["optimizer"] += 8 * _mine(shape, shards, rank) + 4  # and the number of steps
            found["gradients"] += 4 * share if reduced else 0
            if zero < 3 and at.forwards and not finished:
                found["gathered"] += 2 * share * shards
            if zero < 2 and at.backwards and not finished:
                found["unreduced"] += 4 * math.prod(shape)
    return found


def formula(zero: int, shards: int, reduced: bool) -> float:
    """DESIGN's table: bytes per parameter between micro-batches, or with the reduced gradient at the step."""
    d = shards if zero else 1
    between = {0: 4 + 2 + 4 + 8, 1: 4 / d + 2 + 4 + 8 / d, 2: 4 / d + 2 + 4 / d + 8 / d, 3: 4 / d + 4 / d + 8 / d}[zero]
    if not reduced:
        return between
    return 4 / d + 4 / d + 8 / d


def _shards(sharded: ShardedModel) -> int:
    return sharded.mesh["dp"].size() // sharded._blueprint.mesh.replicas if sharded._blueprint.zero else 1


def _padded(shape: tuple[int, ...], shards: int) -> int:
    return -(-shape[0] // shards) * shards * math.prod(shape[1:])


def _mine(shape: tuple[int, ...], shards: int, rank: int) -> int:
    step = -(-shape[0] // shards)
    return max(0, min(step, shape[0] - rank * step)) * math.prod(shape[1:])
