"""Shared by the commands of this folder: a check for missing packages, parts with time limits, the file of results.

At first it imports only Python's standard library, since other packages may be missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PATHS = [ROOT, ROOT / "benchmarks" / "gpu", ROOT / "benchmarks" / "kernels"]
"""Where the processes of these commands import from. shardcomp need not be installed: a checkout is enough."""
TAIL = 2000
"""How many characters of a failed part's output are reported."""


class Refused(Exception):
    """A command cannot run here. The message says why, and what to do."""


def prepare() -> None:
    """Let this process import from the checkout. Raises Refused with every package that is missing."""
    sys.path[:0] = [str(path) for path in PATHS if str(path) not in sys.path]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    absent = [package for package in needed if not _is_installed(re.split(r"[^\w.-]", package)[0])]
    if absent:
        raise Refused(
            f"{sys.executable} lacks {', '.join(absent)}: install them there, or name another Python, make PYTHON=python3"
        )


def _is_installed(package: str) -> bool:
    """Whether a package can be imported. For ninja, its program is enough."""
    return importlib.util.find_spec(package) is not None or package == "ninja" and shutil.which("ninja") is not None


def need_gpu(dry_run: bool) -> None:
    """Raise Refused if torch finds no GPU, unless this is a dry run."""
    if dry_run:
        return
    import torch

    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda} and" if torch.version.cuda else "is built without CUDA and"
        raise Refused(
            f"a GPU is needed: torch {torch.__version__} {built} finds none. With --dry-run this prints what would run, and "
            "measures nothing"
        )


@dataclass(frozen=True)
class Part:
    """A part of a check or benchmark. It runs in its own process.

    name: for the report. command: the words after `python`. seconds: its time limit. out: the file that it writes its results
    to, one JSON value on a line, each as soon as it is known. program: the words before `python`, such as a sanitizer's.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    out: Path
    program: tuple[str, ...] = ()


@dataclass
class Ended:
    """How a part ended.

    state: done, failed, cut off (at its time limit) or not begun. why: the end of a failed part's output. found: its results.
    """

    part: Part
    state: str
    seconds: float
    why: str
    found: list[Any]

    def as_dict(self) -> dict[str, Any]:
        return {"part": self.part.name, "state": self.state, "seconds": round(self.seconds, 1), "why": self.why}


@dataclass
class Budget:
    """The seconds that all parts together may take. They count from the moment when the budget is created."""

    seconds: float
    least: float = 5.0
    """A part begins only if this many seconds are left, or its own limit if that is shorter."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def run(self, parts: Sequence[Part], after: Callable[[Ended], None]) -> list[Ended]:
        """Run parts one after the other, within their limits and the budget. Call `after` when each one has ended."""
        ended = []
        for part in parts:
            limit = min(part.seconds, self.left)
            if limit < min(part.seconds, self.least):
                ended.append(Ended(part, "not begun", 0.0, f"the {self.seconds:.0f} s of all parts were used up", []))
            else:
                ended.append(run(part, limit))
            after(ended[-1])
        return ended


def run(part: Part, limit: float) -> Ended:
    """Run one part for at most `limit` seconds. Then end it, and every process that it started."""
    part.out.unlink(missing_ok=True)
    log = part.out.with_suffix(".log")
    began = time.monotonic()
    paths = [*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*part.program, sys.executable, *part.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        )
        try:
            state = "failed" if process.wait(timeout=limit) else "done"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:
            _end(process)
    why = ""
    if state == "cut off":
        why = f"it had not ended after {limit:.0f} s"
    elif state == "failed":
        why = log.read_text(errors="replace").strip()[-TAIL:] or f"exit status {process.returncode}"
    return Ended(part, state, time.monotonic() - began, why, read(part.out))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(out: Path, result: Any) -> None:
    """Append one result of a part to its file."""
    with out.open("a") as file:
        file.write(json.dumps(result) + "\n")


def read(out: Path) -> list[Any]:
    """The results in the file of a part. An incomplete last line is ignored: the part may have been killed while it wrote."""
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def about() -> dict[str, Any]:
    """What a reader needs to judge the numbers: device, driver, versions, date, commit."""
    import torch

    from shardcomp.inspect.environment import versions

    facts: dict[str, Any] = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "commit": commit(),
        "versions": {**versions(), "triton": _version("triton"), "liger_kernel": _version("liger_kernel")},
    }
    if not torch.cuda.is_available():
        return {**facts, "device": "none", "driver": None, "memory": None, "devices": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "device": properties.name,
        "driver": driver(),
        "memory": properties.total_memory,
        "devices": torch.cuda.device_count(),
        "processors": properties.multi_processor_count,
        "cache": properties.L2_cache_size,
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def driver() -> str | None:
    """The version of the GPU's driver; None if nvidia-smi does not say."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def commit() -> str:
    """The commit of this checkout, with a + if tracked files differ from it, or `unknown` outside of git.

    $COMMIT comes before both: a copy of a checkout, without git's files, can say what it is a copy of.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + "+" * bool(changed) if head else "unknown"


def _output(*command: str) -> str:
    """The output of a program, or "" if it does not exist or fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def result_file(folder: Path, what: str, about: dict[str, Any]) -> Path:
    """A new file for results, named by date and device. Further files of the same day are numbered."""
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    stem = f"{about['date'][:10]}-{device}-{what}"
    numbered = (folder / f"{stem}{f'-{n}' if n > 1 else ''}.json" for n in range(1, 1000))
    return next(path for path in numbered if not path.exists())


def save(path: Path, results: dict[str, Any]) -> None:
    """Write a file of results. Whoever reads it meanwhile sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    scratch.replace(path)
