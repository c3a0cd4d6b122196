"""Where shardcomp keeps what it made once on this machine: libraries of kernels, and captured graphs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$SHARDCOMP_CACHE, or `shardcomp` in the user's cache. It need not exist."""
    if folder := os.environ.get("SHARDCOMP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardcomp"
