"""The checkpoints of one run: written beside the training, one at a time; old ones deleted, damaged ones passed over."""

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
from shardcomp.checkpoint.run_state import Captured, snapshot
from shardcomp.checkpoint.storage import Piece
from shardcomp.errors import CheckpointError, ShardError
from shardcomp.runtime.model import ShardedModel
from shardcomp.training.stack_location import is_communication

EXPORTS = "huggingface"


class Saver:
    """Saves a run to `directory`, as `step-00000100` and so on, by all ranks together.

    keep: how many of the last are kept, None for all; keep_every: also those whose step is a multiple of it. asynchronous:
    copy the states and go on training while a thread writes them; the next save waits for it. export: also write each as a
    HuggingFace directory, `huggingface/step-00000100`; they are kept as their checkpoints are.

    Raises CheckpointError where another job has the directory, after `patience` seconds. `say` gets lines on the first rank.
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
            left = directory_.recover(self.directory)
            if left:
                self.say(f"{self.directory}: cleared away {', '.join(left)} of a run that was ended within a save")

    def resume(
        self,
        sharded: ShardedModel,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scheduler: Any = None,
        path: str | Path | None = None,
    ) -> Restored | None:
        """Go on from the newest checkpoint that is not damaged, or from the one at `path`, which must not be. None where there
        is none. Damaged and, after `path`, later ones are renamed so that no run takes them for its newest."""
        if path is None and not broadcast(bool(directory_.checkpoints(self.directory))):
            return None
        found = load(path or self.directory, sharded, optimizer, scheduler=scheduler, fallback=path is None, say=self.say)
        agreed(lambda: self._set_aside(found))
        return found

    def _set_aside(self, found: Restored) -> None:
        if dist.get_rank() == 0:
            for step, path in directory_.checkpoints(self.directory):
                if step > found.step:
                    place = directory_.set_aside(path, "damaged" if path in found.passed_over else "superseded")
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
        """Save, as `checkpoint.save` does, and delete what is no longer kept. Returns where it will be.

        Asynchronous: returns when the states are copied; call `wait` to know that they are on the disk. Raises CheckpointError
        where this save, or the one that was in flight, failed; then nothing is begun.
        """
        self.wait()
        path = self.directory / directory_.name_of(step)
        captured = agreed(lambda: snapshot(sharded, optimizer, step, scheduler, extra))
        files = config_text(sharded)
        if not self.asynchronous:
            self._write(path, captured, files)
            return path
        captured = replace(captured, pieces=self._staged(captured.pieces))
        self._thread = threading.Thread(
            target=self._attempt, args=(path, captured, files), name="shardcomp-checkpoint", daemon=True
        )
        self._thread.start()
        return path

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the save in flight, on all ranks. meanwhile: called once a second.

        Raises its CheckpointError, or what torch.distributed raised where a rank was lost within it.
        """
        thread, self._thread = self._thread, None
        while thread is not None and thread.is_alive():
            thread.join(1.0)
            meanwhile()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the save in flight, and let another job have the directory."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _staged(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copies on the host, in memory that the next save uses again."""
        found = {}
        for key, piece in pieces.items():
            local = piece.local.detach()
            into = self._copies.get(key)
            if into is None or into.shape != local.shape or into.dtype != local.dtype:
                into = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._copies[key] = into
            into.copy_(local, non_blocking=local.is_cuda)
            found[key] = replace(piece, local=into)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return found

    def _attempt(self, path: Path, captured: Captured, files: Mapping[str, bytes]) -> None:
        try:
            self._write(path, captured, files)
        except BaseException as problem:
            if not isinstance(problem, ShardError) and not is_communication(problem):
                problem = CheckpointError(f"{path}: not saved: {type(problem).__name__}: {problem}")
            self._failure = problem

    def _write(self, path: Path, captured: Captured, files: Mapping[str, bytes]) -> None:
        write(path, captured, files, self._group)
        agreed(lambda: self._tidy(path), self._group)

    def _tidy(self, path: Path) -> None:
        """Export, and delete what is not kept."""
        if dist.get_rank() != 0:
            return
        exports = self.directory / EXPORTS
        if self.export:
            exports.mkdir(exist_ok=True)
            convert(path, exports / path.name)
        directory_.prune(self.directory, self.keep, self.keep_every)
        if self.export:
            directory_.prune(exports, self.keep, self.keep_every)
