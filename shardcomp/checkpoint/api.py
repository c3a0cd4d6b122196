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
from shardcomp.checkpoint.plain_values import unplain
from shardcomp.checkpoint.run_state import Snapshot, restore, snapshot
from shardcomp.checkpoint.storage import SavePlanner, Writer
from shardcomp.errors import CheckpointError, ShardError
from shardcomp.runtime.model import ShardedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """A run that resumes from a checkpoint.

    Attributes:
        path: the checkpoint.
        step, extra: what `save` took.
        policy, versions: what it was saved under.
        random: whether the random generators continue where they were, as on the same mesh and kind of device. Otherwise
            dropout draws new numbers that depend on the step, and Python's, NumPy's and torch's generators do not change.
        passed_over: newer checkpoints that are damaged -> why.
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
    """Write a checkpoint, by all ranks together, to a file system that they share.

    It appears at `path` when all of it is on the disk, and replaces an earlier one. Gradients are not saved: call it between
    two optimizer steps.

    Args:
        path: its directory. One named `step-00000100` in a run's directory is seen by `load` and `latest`.
        sharded: the model, from `shardcomp.shard`.
        optimizer: any that keeps plain values, 0-d tensors and tensors like its parameters.
        step: how many optimizer steps the run has made.
        scheduler: anything with `state_dict` and `load_state_dict` of plain values, such as torch's.
        extra: further plain values, such as the position in the data.

    Returns:
        The absolute path.

    Raises:
        CheckpointError: on every rank, where it cannot be written. What was there stays.

    Example:
        >>> path = shardcomp.checkpoint.save(folder / "last", sharded, optimizer, step=100, extra={"epoch": 2})
        >>> shardcomp.checkpoint.load(path, sharded, optimizer).extra
        {'epoch': 2}
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
    """Read a checkpoint into a model, its optimizer and scheduler, by all ranks together.

    The topology, schedule, ZeRO stage and precision may differ from those of the run that saved it. Every byte is checked
    before anything changes, each rank reading its share of the files.

    Args:
        path: a checkpoint, or a run's directory, whose newest is taken.
        sharded, optimizer, scheduler: what to read into, as in `save`.
        fallback: whether to take the newest good checkpoint before it, where it is damaged.
        say: gets one line about each damaged checkpoint, on the first rank. By default it is a warning.

    Returns:
        What the checkpoint says of its run.

    Raises:
        CheckpointError: on every rank, where it is damaged or does not fit.

    Example:
        >>> path = shardcomp.checkpoint.save(folder / "newest", sharded, step=7)
        >>> restored = shardcomp.checkpoint.load(path, sharded)
        >>> restored.step, restored.random
        (7, True)
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
    """Check every byte of a checkpoint, by all ranks together, each reading its share of the files.

    Args:
        path: of the checkpoint.

    Raises:
        CheckpointError: on every rank, naming the file.

    Example:
        >>> shardcomp.checkpoint.verify(shardcomp.checkpoint.save(folder / "good", sharded, step=1))
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def check_own_files() -> None:
        sums = directory.read_sums(path)
        directory.check(path, sums, sorted(sums)[rank::ranks])

    agreed(check_own_files)


def _candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` may mean, the first choice first."""
    if (path / directory.MANIFEST).exists() or (path / directory.SUMS).exists():
        older = [place for _, place in directory.checkpoints(path.parent)]
        return [path, *reversed(older[: older.index(path)] if path in older else [])]
    known = [place for _, place in directory.checkpoints(path)]
    if not known:
        what = "does not exist" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(
            f"{path} {what}: give a checkpoint, such as {path / directory.name_of(100)}, or a run's directory"
        )
    return known[::-1]


def config_text(sharded: ShardedModel) -> dict[str, bytes]:
    """HuggingFace's config.json, which `convert` needs to write a HuggingFace directory."""
    if not hasattr(sharded.config, "to_json_string"):
        return {}
    return {directory.CONFIG: sharded.config.to_json_string().encode()}


def write(path: Path, state: Snapshot, files: Mapping[str, bytes], group: Any = None) -> None:
    """Write a snapshot. Collective over `group`. Raises CheckpointError on every rank."""
    planner = SavePlanner(state.notes)
    writer = Writer(path, planner, state.manifest, files)
    try:
        dcp.save(dict(state.boxes), storage_writer=writer, planner=planner, process_group=group)
    except dcp.api.CheckpointException as problem:
        agreed(lambda: shutil.rmtree(writer.partial, ignore_errors=True) if dist.get_rank() == 0 else None, group)
        rank, (cause, _) = min(problem.failures.items())
        if isinstance(cause, ShardError):
            raise cause from problem
        raise CheckpointError(f"{path}: not saved: rank {rank}: {type(cause).__name__}: {cause}") from problem


def agreed(call: Callable[[], T], group: Any = None) -> T:
    """`call()` on every rank. Where it fails on one, all raise CheckpointError with the first such rank's message."""
    problem: Exception | None = None
    try:
        result = call()
    except Exception as error:
        problem = error
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, None if problem is None else str(problem) or type(problem).__name__, group=group)
    if problem is not None and not isinstance(problem, (ShardError, OSError)):
        raise problem
    for message in messages:
        if message is not None:
            raise CheckpointError(message) from problem
    return result


def broadcast(value: Any) -> Any:
    """The first rank's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
