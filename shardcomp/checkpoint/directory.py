"""Checkpoints on the disk: complete or invisible, checked byte by byte, and one job to a directory.

A checkpoint is a directory. It is written under a hidden name beside its place, and renamed when it is complete. `SHA256SUMS`
lists its files in the format of `sha256sum -c`.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from shardcomp.errors import CheckpointError

FORMAT = 1
"""The version of the format. Higher ones are refused."""
SUMS, MANIFEST, CONFIG, LOCK = "SHA256SUMS", "checkpoint.json", "config.json", ".lock"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)\n")
_NAME = re.compile(r"step-(\d+)")
_ASIDE = re.compile(r"(damaged|superseded)-.*")
_HIDDEN = re.compile(r"\.(step-\d+)\.(partial|previous|removed)")
BLOCK = 4 * 2**20
"""Bytes that are read or written at a time."""


def name_of(step: int) -> str:
    """The name of the checkpoint of a step, among the checkpoints of one run."""
    return f"step-{step:08d}"


def partial(path: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def checkpoints(directory: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints in a directory.

    None of them is partly written, but one may be damaged: their bytes are not read.

    Args:
        directory: of a run. It need not exist.

    Returns:
        (step, path) of each, the highest step last.

    Example:
        >>> shardcomp.checkpoint.checkpoints(folder / "no run")
        []
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        return []
    visible = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    steps = {path: _step_of(path) for path in visible if not _ASIDE.fullmatch(path.name)}
    return sorted((step, path) for path, step in steps.items() if step is not None)


def _step_of(path: Path) -> int | None:
    if match := _NAME.fullmatch(path.name):
        return int(match[1])
    try:
        return int(json.loads((path / MANIFEST).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_others(path: Path) -> None:
    """Raise CheckpointError where `path` is something else than a checkpoint, which would be replaced."""
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: name a new one for the checkpoint")
    if path.exists() and any(path.iterdir()) and not ((path / MANIFEST).exists() and (path / SUMS).exists()):
        raise CheckpointError(f"{path} holds something else than a checkpoint, so it is not overwritten: name a new directory")


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint in a run's directory.

    Args:
        directory: of a run. It need not exist.

    Returns:
        Its path, or None where there is none.

    Example:
        >>> path = shardcomp.checkpoint.save(folder / "run" / "step-00000001", sharded, step=1)
        >>> shardcomp.checkpoint.latest(folder / "run").name
        'step-00000001'
    """
    known = checkpoints(directory)
    return known[-1][1] if known else None


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """`checkpoint.json`, a line for each tensor. Numbers are written so that reading gives the same bits."""
    head = json.dumps({key: value for key, value in manifest.items() if key != "tensors"}, indent=1)
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.get("tensors", {}).items()]
    return (head.removesuffix("\n}") + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """`checkpoint.json`, after its bytes and the list of files are checked. The bytes of other files are not read.

    Raises CheckpointError that names the file.
    """
    sums = read_sums(path)
    check(path, sums, [MANIFEST])
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{path / MANIFEST} is not a description of a checkpoint ({_words(problem)})") from problem
    if version != FORMAT:
        release = manifest.get("versions", {}).get("shardcomp", "?")
        raise CheckpointError(
            f"{path / MANIFEST}: written in format {version} by shardcomp {release}; "
            f"this release reads format {FORMAT}: use that release, or export with its `shardcomp convert`"
        )
    return dict(manifest)


def read_sums(path: Path) -> dict[str, str]:
    """File -> SHA-256, from `SHA256SUMS`.

    Raises CheckpointError where it cannot be read, or does not list the files of the directory. Hidden files do not count.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} {'is not a directory' if path.exists() else 'does not exist'}: give a checkpoint")
    try:
        text = (path / SUMS).read_bytes().decode("ascii")
    except FileNotFoundError as problem:
        raise CheckpointError(
            f"{path / SUMS} is missing: this is not a checkpoint of shardcomp, or it was copied in part"
        ) from problem
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path / SUMS} cannot be read ({_words(problem)})") from problem
    sums = {name: digest for digest, name in _LINE.findall(text)}
    if text != sums_text(sums) or MANIFEST not in sums:
        raise CheckpointError(f"{path / SUMS} is damaged: it is not the list that was written")
    files = {file.name for file in path.iterdir() if not file.name.startswith(".")} - {SUMS}
    for missing in sorted(sums.keys() - files):
        raise CheckpointError(f"{path / missing} is missing")
    for foreign in sorted(files - sums.keys()):
        raise CheckpointError(f"{path / foreign} is not a file of this checkpoint")
    return sums


def sums_text(sums: Mapping[str, str]) -> str:
    """`SHA256SUMS`, as `sha256sum -c` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def check(path: Path, sums: Mapping[str, str], names: Iterable[str]) -> None:
    """Read files and compare them with their sums. Raises CheckpointError that names the first one that differs."""
    for name in names:
        digest = hashlib.sha256()
        try:
            with open(path / name, "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        except OSError as problem:
            raise CheckpointError(f"{path / name} cannot be read ({_words(problem)})") from problem
        if digest.hexdigest() != sums[name]:
            raise CheckpointError(f"{path / name} is damaged: its bytes are not those that {SUMS} was written for")


def write(path: Path, content: bytes) -> str:
    """Write a file, wait until it is on the disk, and return its SHA-256."""
    with open(path, "wb") as file:
        file.write(content)
        sync(file)
    return hashlib.sha256(content).hexdigest()


def sync(file: IO[bytes]) -> None:
    """Wait until a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: Path) -> None:
    """Rename a complete checkpoint to its place, where it replaces an earlier one.

    A job that is killed between the two renames leaves the earlier one hidden; `put_back` brings it back.
    """
    sync_directory(partial(path))
    if path.exists():
        shutil.rmtree(_previous(path), ignore_errors=True)
        path.rename(_previous(path))
    try:
        partial(path).rename(path)
    except OSError:
        put_back(path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(_previous(path), ignore_errors=True)


def put_back(path: Path) -> None:
    """Bring back the checkpoint that `publish` was replacing when it was interrupted."""
    if _previous(path).exists() and not path.exists():
        _previous(path).rename(path)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def remove(path: Path) -> None:
    """Delete a checkpoint. It is hidden first, so that nobody sees half of it."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(directory: Path) -> list[str]:
    """Remove what a killed job left in a run's directory, and return the names. The caller has the lock."""
    hidden = sorted(path for path in directory.iterdir() if _HIDDEN.fullmatch(path.name))
    for path in hidden:
        match = _HIDDEN.fullmatch(path.name)
        assert match is not None
        put_back(directory / match[1])
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in hidden]


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that no run takes it for its newest: `step-00000100` becomes `damaged-step-00000100`."""
    names = itertools.chain([f"{why}-{path.name}"], (f"{why}-{path.name}.{number}" for number in itertools.count(1)))
    place = next(place for name in names if not (place := path.with_name(name)).exists())
    path.rename(place)
    return place


def prune(directory: Path, keep: int | None, keep_every: int | None) -> None:
    """Delete a run's checkpoints (`step-00000100` and so on), except the last `keep` and those of every `keep_every`-th step.
    keep = None keeps all."""
    if keep is None:
        return
    for step, path in [(step, path) for step, path in checkpoints(directory) if _NAME.fullmatch(path.name)][:-keep]:
        if not (keep_every and step % keep_every == 0):
            remove(path)


class Lock:
    """One job to a directory, as long as its process lives: the system releases the lock of a killed process.

    Raises CheckpointError, after `patience` seconds, where another job has the directory, and names its process and machine.
    """

    def __init__(self, directory: Path, patience: float = 0.0, say: Callable[[str], None] = lambda line: None) -> None:
        path = directory / LOCK
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115
        except OSError as problem:
            raise CheckpointError(f"{directory} cannot be written to ({_words(problem)})") from problem
        until, told = time.monotonic() + patience, False
        while not self._take(path):
            holder = self._holder()
            if time.monotonic() >= until:
                self._file.close()
                raise CheckpointError(
                    f"{directory} is in use by {holder}: two jobs would delete each other's checkpoints; end that one, or name "
                    "another directory"
                )
            if not told:
                say(f"{directory} is in use by {holder}; waiting {patience:.0f} s for it to leave")
                told = True
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _take(self, path: Path) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as problem:
            self._file.close()
            raise CheckpointError(
                f"{path}: this file system has no locks ({_words(problem)}), so that two jobs could delete each other's "
                "checkpoints: mount it with them (Lustre: -o flock), or name a directory on another one"
            ) from problem
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read() or "another job"

    def release(self) -> None:
        """Release the directory for another job."""
        self._file.close()


def _words(problem: BaseException) -> str:
    return str(getattr(problem, "strerror", None) or problem or type(problem).__name__)
