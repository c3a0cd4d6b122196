"""A directory that appears complete or not at all: it is written beside its place and renamed."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shardcomp.errors import CheckpointError


class Staging:
    """A new directory at `path`, to become `destination`.

    own: patterns of the files that are written. Those of an earlier version are replaced, its other files stay.
    is_earlier: whether a directory at the destination is an earlier version, which may be replaced.
    """

    def __init__(self, destination: Path, own: tuple[str, ...], is_earlier: Callable[[Path], bool]) -> None:
        self.destination = destination.expanduser().resolve()
        self.own = own
        self.is_earlier = is_earlier
        self.path = self._beside("saving")
        self.previous = self._beside("previous")

    def begin(self) -> None:
        """Make the directory.

        Raises CheckpointError where the destination is anything but an earlier version, and OSError where nothing can be
        written.
        """
        self._recover()
        self._refuse_others()
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)  # of an interrupted save
        self.path.mkdir()

    def _beside(self, what: str) -> Path:
        return self.destination.with_name(f".{self.destination.name}.{what}")

    def _recover(self) -> None:
        """Put back what an earlier commit had moved aside when it was interrupted."""
        if self.previous.exists():
            if self.destination.exists():
                shutil.rmtree(self.previous)
            else:
                self.previous.rename(self.destination)

    def _refuse_others(self) -> None:
        if not self.destination.exists():
            return
        if not self.destination.is_dir():
            raise CheckpointError(f"{self.destination} is a file: name a directory")
        if os.path.ismount(self.destination):
            raise CheckpointError(f"{self.destination} is a mount point, which cannot be replaced: name a directory in it")
        files = sorted(path.name for path in self.destination.iterdir())
        if files and not self.is_earlier(self.destination):
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            raise CheckpointError(
                f"{self.destination} is not an earlier save, so it is not overwritten (it holds {', '.join(files[:3])}{more}): "
                "name a new or empty directory"
            )

    def commit(self) -> None:
        """Rename the directory to its destination.

        A process that is killed between the two renames leaves the earlier version beside the destination. The next save puts
        it back.
        """
        if not self.destination.exists():
            self.path.rename(self.destination)
            return
        self._keep_other_files()
        shutil.copymode(self.destination, self.path)
        self.destination.rename(self.previous)
        try:
            self.path.rename(self.destination)
        except OSError:
            self.previous.rename(self.destination)
            raise
        shutil.rmtree(self.previous, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written; nothing after a commit."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _keep_other_files(self) -> None:
        for old in self.destination.iterdir():
            new = self.path / old.name
            if new.exists() or any(fnmatch.fnmatch(old.name, pattern) for pattern in self.own):
                continue
            if old.is_dir() and not old.is_symlink():
                shutil.copytree(old, new, symlinks=True, copy_function=_link)
            else:
                _link(old, new)


def _link(old: str | Path, new: str | Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)
