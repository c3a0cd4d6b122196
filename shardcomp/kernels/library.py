"""The choice of a library of kernels, and its loading: when the first operator runs, not when shardcomp is imported.

`SHARDCOMP_KERNELS` makes the choice. `aot` is the library that was installed with shardcomp. `jit` is built on this machine
once and cached. `reference` is no library: the operators' references run. `auto`, the default, takes the first of these that
works. An empty variable counts as unset. A log line of `shardcomp.kernels` says which one runs, and why.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardcomp.cache_dir import cache_dir
from shardcomp.errors import KernelError
from shardcomp.kernels.build import BuildError, Recipe, build, own_level, recipe
from shardcomp.torch_private import dispatch_has_kernel

PACKAGED = Path(__file__).resolve().parents[1] / "_kernels.so"
"""Where `CPU_EXT=1 pip install` puts the library."""
VARIABLE = "SHARDCOMP_KERNELS"
_WORDS = ("auto", "aot", "jit", "reference")
_log = logging.getLogger("shardcomp.kernels")


@dataclass(frozen=True)
class Library:
    """What runs the operators. kind: `aot`, `jit` or `reference`. why: the reason, and what failed before it."""

    kind: str
    path: Path | None
    why: str


_loaded: Library | None = None
_lock = threading.Lock()


def load() -> Library:
    """The library. The first call loads it, and builds it if necessary.

    Raises:
        KernelError: `SHARDCOMP_KERNELS` is no valid choice, or chooses a library that cannot run here.
    """
    global _loaded
    if _loaded is None:
        # Checked again under the lock: threads of several ranks may come here at once.
        with _lock:
            if _loaded is None:
                _loaded = _load(choice())
    return _loaded


def choice() -> str:
    """The word of `SHARDCOMP_KERNELS`, which need not be a valid one. `auto` if it is unset or empty."""
    return os.environ.get(VARIABLE) or "auto"


def provides(name: str, device: str) -> bool:
    """Whether a kernel of an operator is registered for a kind of device, `cpu` or `cuda`."""
    load()
    return bool(dispatch_has_kernel(f"shardcomp::{name}", device.upper()))


def _load(word: str) -> Library:
    if word not in _WORDS:
        raise KernelError(f"{VARIABLE}={word}: there is no such choice; it is one of {', '.join(_WORDS)}")
    if word == "reference":
        return _logged(Library("reference", None, f"{VARIABLE}=reference"))
    failures = []
    for kind, find in (("aot", _packaged), ("jit", _built)):
        if word not in ("auto", kind):
            continue
        try:
            path, why = find()
            _open(path)
        # `auto` tries the next choice, and the log line has every reason.
        except (BuildError, OSError) as error:
            failures.append(str(error))
        else:
            return _logged(Library(kind, path, "; ".join((why, *failures))))
    if word != "auto":
        raise KernelError(f"{VARIABLE}={word}: {failures[0]}\n{VARIABLE}=auto takes the operators' references instead")
    return _logged(Library("reference", None, "; ".join(failures)), logging.WARNING)


def _logged(library: Library, level: int = logging.INFO) -> Library:
    runs = "the operators' references, in plain PyTorch" if library.path is None else str(library.path)
    _log.log(level, "kernels: %s (%s)", runs, library.why)
    return library


def _open(path: Path) -> None:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def _packaged() -> tuple[Path, str]:
    if not PACKAGED.exists():
        raise BuildError("none is installed with shardcomp: CPU_EXT=1 pip install --no-build-isolation does")
    return PACKAGED, "installed with shardcomp"


def _built() -> tuple[Path, str]:
    """The library of this machine, with CUDA's kernels where torch can use them.

    If nvcc cannot compile these, the library has the CPU's kernels alone, unless `SHARDCOMP_KERNELS` demands it by name. A file
    notes the failure, so that the next process does not wait for it again.
    """
    how = recipe([own_level()], cuda=None if torch.version.cuda else False)
    if how.nvcc is None:
        return _cached(how)
    refused = _path(how).with_suffix(".refused")
    if not refused.exists():
        try:
            return _cached(how)
        except BuildError as error:
            if choice() != "auto":
                raise
            refused.write_text(str(error))
    _log.warning("kernels: nvcc could not build those of CUDA, references run there; remove %s to try again", refused)
    return _cached(replace(how, nvcc=None))


def _path(how: Recipe) -> Path:
    return cache_dir() / f"kernels-{how.key()}.so"


def _cached(how: Recipe) -> tuple[Path, str]:
    path = _path(how)
    if path.exists():
        return path, "built before"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        if path.exists():
            return path, "built meanwhile by another process"
        return _build(how, path)


def _build(how: Recipe, path: Path) -> tuple[Path, str]:
    print(f"shardcomp: building its kernels, once, into {path.parent}", file=sys.stderr, flush=True)
    build(how, path)
    return path, "built now"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock, so that of several ranks on a machine one builds and the others wait."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
