"""Which library of kernels runs the operators, and loading it: when the first operator runs, not when shardcomp is imported.

`SHARDCOMP_KERNELS` says which: `aot` is the one that was installed with shardcomp; `jit` one that is built on this machine,
once, and found in a cache from then on; `reference` is none, so that the operators' references run; `auto`, the default, is the
first of these that there is. A log line of `shardcomp.kernels` says which it was and why.
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

from shardcomp.errors import KernelError
from shardcomp.kernels.build import BuildError, Recipe, build, own_level, recipe

PACKAGED = Path(__file__).resolve().parents[1] / "_kernels.so"
"""Where `CPU_EXT=1 pip install` puts the library."""
VARIABLE = "SHARDCOMP_KERNELS"
_WORDS = ("auto", "aot", "jit", "reference")
_log = logging.getLogger("shardcomp.kernels")


@dataclass(frozen=True)
class Library:
    """What runs the operators. kind: `aot`, `jit` or `reference`. why: in a few words, also what spoke against the others."""

    kind: str
    path: Path | None
    why: str


_held: Library | None = None
_lock = threading.Lock()


def load() -> Library:
    """The library, loaded by the first call, which may have to build it.

    Raises KernelError if `SHARDCOMP_KERNELS` names one that cannot run here, or is no word that there is.
    """
    global _held
    if _held is None:
        with _lock:
            if _held is None:
                _held = _load(os.environ.get(VARIABLE, "auto"))
    return _held


def provides(name: str, device: str) -> bool:
    """Whether the library has an implementation of an operator for a kind of device, `cpu` or `cuda`."""
    load()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"shardcomp::{name}", device.upper()))


def cache() -> Path:
    """The folder of libraries that were built just in time: $SHARDCOMP_CACHE, or shardcomp/ in the user's cache folder."""
    if named := os.environ.get("SHARDCOMP_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardcomp"


def _load(word: str) -> Library:
    if word not in _WORDS:
        raise KernelError(f"{VARIABLE}={word}: there is no such choice; it is one of {', '.join(_WORDS)}")
    if word == "reference":
        return _told(Library("reference", None, f"{VARIABLE}=reference"))
    against = []
    for kind, find in (("aot", _packaged), ("jit", _built)):
        if word not in ("auto", kind):
            continue
        try:
            path, why = find()
            _open(path)
        except (BuildError, OSError) as error:
            against.append(str(error))
        else:
            return _told(Library(kind, path, "; ".join((why, *against))))
    if word != "auto":
        raise KernelError(f"{VARIABLE}={word}: {against[0]}\n{VARIABLE}=auto takes the operators' references instead")
    return _told(Library("reference", None, "; ".join(against)), logging.WARNING)


def _told(library: Library, level: int = logging.INFO) -> Library:
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
    """The kernels of CUDA are taken along where torch can use them. If nvcc cannot compile them here, those of the CPU run all
    the same, unless this library was asked for by its name."""
    how = recipe([own_level()], cuda=None if torch.version.cuda else False)
    if how.nvcc is None:
        return _cached(how)
    refused = _path(how).with_suffix(".refused")
    if not refused.exists():
        try:
            return _cached(how)
        except BuildError as error:
            if os.environ.get(VARIABLE, "auto") != "auto":
                raise
            refused.write_text(str(error))
    _log.warning("kernels: nvcc could not build those of CUDA, references run there; remove %s to try again", refused)
    return _cached(replace(how, nvcc=None))


def _path(how: Recipe) -> Path:
    return cache() / f"kernels-{how.key()}.so"


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
    """One process at a time."""
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
