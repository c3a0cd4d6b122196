"""The checkpoints of one run: written while training continues, old ones deleted, damaged ones passed over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardcomp.checkpoint import directory as directory_
from shardcomp.checkpoint.api import Restored, agreed, broadcast, config_text, load, write
from shardcomp.checkpoint.convert import convert
from shardcomp.checkpoint.run_state import Snapshot, snapshot
from shardcomp.checkpoint.storage import Box
from shardcomp.errors import CheckpointError, ShardError
from shardcomp.runtime.model import ShardedModel
from shardcomp.training.stack_location import is_communication

EXPORTS = "huggingface"


class Saver:
    """Saves a run to a directory, as `step-00000100` and so on, by all ranks together.

    Args:
        directory: of the run.
        keep: how many of the newest checkpoints to keep; None for all.
        keep_every: also keep those whose step is a multiple of it.
        asynchronous: whether to copy the states and return, while a thread writes them. The next save waits for it.
        export: whether to write each checkpoint as a HuggingFace directory too, `huggingface/step-00000100`.
        patience: seconds to wait for another job to leave the directory.
        say: gets lines about what happens, on the first rank.

    Raises:
        CheckpointError: where another job has the directory.

    Example:
        >>> saver = shardcomp.checkpoint.Saver(folder / "saved", keep=1, asynchronous=False)
        >>> [saver.save(sharded, optimizer, step=step).name for step in (1, 2)]
        ['step-00000001', 'step-00000002']
        >>> saver.resume(sharded, optimizer).step
        2
        >>> saver.close()
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = True,
        export: bool = False,
        patience: float = 0.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep = {keep}: keep at least 1 checkpoint, or None for all")
        self.directory = Path(directory).expanduser().absolute()
        self.keep, self.keep_every, self.export = keep, keep_every, export
        self.asynchronous = asynchronous
        self.say = say if dist.get_rank() == 0 else lambda line: None
        self._lock: directory_.Lock | None = None
        agreed(lambda: self._open(patience))
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def _open(self, patience: float) -> None:
        if dist.get_rank() == 0:
            self._lock = directory_.Lock(self.directory, patience, self.say)
            removed = directory_.recover(self.directory)
            if removed:
                self.say(f"{self.directory}: cleared away {', '.join(removed)} of a run that was ended within a save")

    def resume(
        self,
        sharded: ShardedModel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: Any = None,
        path: str | Path | None = None,
    ) -> Restored | None:
        """Load the newest good checkpoint, or the one at `path`.

        Damaged checkpoints, and those newer than `path`, are renamed so that no run takes them for its newest.

        Args:
            sharded, optimizer, scheduler: as in `checkpoint.load`.
            path: a checkpoint, which must be good.

        Returns:
            What the checkpoint says of its run; None where there is no checkpoint.

        Raises:
            CheckpointError: where every checkpoint is damaged, or the one at `path` is.

        Example:
            See the class.
        """
        if path is None and not broadcast(bool(directory_.checkpoints(self.directory))):
            return None
        restored = load(path or self.directory, sharded, optimizer, scheduler=scheduler, fallback=path is None, say=self.say)
        agreed(lambda: self._set_aside(restored))
        return restored

    def _set_aside(self, restored: Restored) -> None:
        if dist.get_rank() == 0:
            for step, path in directory_.checkpoints(self.directory):
                if step > restored.step:
                    place = directory_.set_aside(path, "damaged" if path in restored.passed_over else "superseded")
                    self.say(f"{path.name} is now {place.name}")

    def save(
        self,
        sharded: ShardedModel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int,
        scheduler: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save as `checkpoint.save` does, and delete checkpoints that are not to be kept.

        An asynchronous save returns when the states are copied. Call `wait` to know that they are on the disk.

        Args:
            sharded, optimizer, step, scheduler, extra: as in `checkpoint.save`.

        Returns:
            Where the checkpoint will be.

        Raises:
            CheckpointError: where this save failed, or the one under way; then this one does not start.
        """
        self.wait()
        path = self.directory / directory_.name_of(step)
        state = agreed(lambda: snapshot(sharded, optimizer, step, scheduler, extra))
        files = config_text(sharded)
        if not self.asynchronous:
            self._write(path, state, files)
            return path
        state = replace(state, boxes=self._staged(state.boxes))
        self._thread = threading.Thread(
            target=self._attempt, args=(path, state, files), name="shardcomp-checkpoint", daemon=True
        )
        self._thread.start()
        return path

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the save under way, on all ranks.

        Args:
            meanwhile: called once a second.

        Raises:
            CheckpointError: where that save failed. Where a rank was lost in it, torch.distributed's own exception.
        """
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            thread.join(1.0)
            meanwhile()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the save under way, and release the directory for another job."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _staged(self, boxes: Mapping[str, Box]) -> dict[str, Box]:
        """Copies on the host, in memory that every save uses again."""
        copies = {}
        for key, box in boxes.items():
            local = box.local.detach()
            copy = self._copies.get(key)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._copies[key] = copy
            copy.copy_(local, non_blocking=local.is_cuda)
            copies[key] = replace(box, local=copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _attempt(self, path: Path, state: Snapshot, files: Mapping[str, bytes]) -> None:
        try:
            self._write(path, state, files)
        except BaseException as problem:
            if not isinstance(problem, ShardError) and not is_communication(problem):
                problem = CheckpointError(f"{path}: not saved: {type(problem).__name__}: {problem}")
            self._failure = problem

    def _write(self, path: Path, state: Snapshot, files: Mapping[str, bytes]) -> None:
        write(path, state, files, self._group)
        agreed(lambda: self._tidy(path), self._group)

    def _tidy(self, path: Path) -> None:
        """Export, and delete what is not to be kept."""
        if dist.get_rank() != 0:
            return
        exports = self.directory / EXPORTS
        if self.export:
            exports.mkdir(exist_ok=True)
            convert(path, exports / path.name)
        directory_.prune(self.directory, self.keep, self.keep_every)
        if self.export:
            directory_.prune(exports, self.keep, self.keep_every)
