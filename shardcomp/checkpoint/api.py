"""Saving and loading one checkpoint, by all ranks together."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from shardcomp.checkpoint import directory
from shardcomp.checkpoint.run_state import Captured, restore, snapshot, unplain
from shardcomp.checkpoint.storage import SavePlanner, Writer
from shardcomp.errors import CheckpointError, ShardError
from shardcomp.runtime.model import ShardedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint said of its run.

    path: which one it was; step, extra: what `save` was given; policy, versions: what it was saved under. random: whether the
    generators go on where they were, as on the same mesh and kind of device; else dropout draws new numbers that depend on the
    step, and Python's, NumPy's and torch's generators are left as they are. passed_over: newer checkpoints that are damaged,
    and why.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    policy: dict[str, Any]
    versions: dict[str, str]
    random: bool
    passed_over: dict[Path, str] = field(default_factory=dict)


def save(
    path: str | Path,
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, by all ranks together, to a file system that they share. It appears at `path` when all of it is on
    the disk; one that is there is replaced.

    scheduler: anything with `state_dict` and `load_state_dict` of plain values, such as torch's. extra: plain values. Gradients
    are not saved: call it between two optimizer steps. Raises CheckpointError on every rank, and leaves what was there, where
    it cannot be written.
    """
    place = Path(path).expanduser().absolute()
    write(place, agreed(lambda: snapshot(sharded, optimizer, step, scheduler, extra)), config_text(sharded))
    return place


def load(
    path: str | Path,
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    fallback: bool = False,
    say: Callable[[str], None] | None = None,
) -> Restored:
    """Read a checkpoint into a model, its optimizer and scheduler, by all ranks together, however they are cut.

    path: a checkpoint, or the directory of a run, whose newest is taken. Every byte of it is checked before anything is
    changed, each rank reading its share of the files. fallback: where it is damaged, take the newest one before it that is not;
    `say` gets one line about it on the first rank (default: a warning). Raises CheckpointError on every rank.
    """
    passed_over: dict[Path, str] = {}
    candidates = agreed(lambda: _candidates(Path(path).expanduser().absolute()))
    candidates = broadcast(candidates)
    for place in candidates:
        try:
            manifest = agreed(lambda place=place: directory.read_manifest(place))  # type: ignore[misc]
            verify(place)
        except CheckpointError as problem:
            if not fallback or place == candidates[-1]:
                raise
            passed_over[place] = str(problem)
            if dist.get_rank() == 0:
                following = candidates[candidates.index(place) + 1]
                (say or warnings.warn)(f"{problem}; going back to {following}")
            continue
        same = agreed(lambda: restore(place, manifest, sharded, optimizer, scheduler))  # noqa: B023
        return Restored(
            place, manifest["step"], unplain(manifest["extra"]), manifest["policy"], manifest["versions"], same, passed_over
        )
    raise AssertionError("there is always a candidate")


def verify(path: Path) -> None:
    """Check every byte of a checkpoint, each rank its share of the files. Raises CheckpointError on every rank, naming the
    file."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def mine() -> None:
        sums = directory.read_sums(path)
        directory.check(path, sums, sorted(sums)[rank::ranks])

    agreed(mine)


def _candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` may mean, the one to begin with first."""
    if (path / directory.MANIFEST).exists() or (path / directory.SUMS).exists():
        older = [each for _, each in directory.checkpoints(path.parent)]
        return [path, *reversed(older[: older.index(path)] if path in older else [])]
    found = [each for _, each in directory.checkpoints(path)]
    if not found:
        what = "does not exist" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(
            f"{path} {what}: give a checkpoint, such as {path / directory.name_of(100)}, or a run's directory"
        )
    return found[::-1]


def config_text(sharded: ShardedModel) -> dict[str, bytes]:
    """HuggingFace's config.json, with which a checkpoint can be turned into a HuggingFace directory."""
    if not hasattr(sharded.config, "to_json_string"):
        return {}
    return {directory.CONFIG: sharded.config.to_json_string().encode()}


def write(path: Path, captured: Captured, files: Mapping[str, bytes], group: Any = None) -> None:
    """Write what was captured. Collective over `group`. Raises CheckpointError on every rank."""
    planner = SavePlanner(captured.notes)
    writer = Writer(path, planner, captured.manifest, files)
    try:
        dcp.save(dict(captured.pieces), storage_writer=writer, planner=planner, process_group=group)
    except dcp.api.CheckpointException as problem:
        agreed(lambda: shutil.rmtree(writer.partial, ignore_errors=True) if dist.get_rank() == 0 else None, group)
        rank, (cause, _) = min(problem.failures.items())
        if isinstance(cause, ShardError):
            raise cause from problem
        raise CheckpointError(f"{path}: not saved: rank {rank}: {type(cause).__name__}: {cause}") from problem


def agreed(call: Callable[[], T], group: Any = None) -> T:
    """`call()` on every rank. Where it fails on one, all raise CheckpointError with the first such rank's words."""
    problem: Exception | None = None
    try:
        found = call()
    except Exception as error:
        problem = error
    everyones: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, None if problem is None else str(problem) or type(problem).__name__, group=group)
    if problem is not None and not isinstance(problem, (ShardError, OSError)):
        raise problem
    for words in everyones:
        if words is not None:
            raise CheckpointError(words) from problem
    return found


def broadcast(value: Any) -> Any:
    """The first rank's value, on every rank."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
