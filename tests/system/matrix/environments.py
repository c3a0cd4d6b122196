"""One virtual environment for each pair of releases: a thin one, which takes what it does not change from the one that runs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_PINNED = Path(__file__).with_name("versions.txt")
_PIP = threading.Lock()


@dataclass(frozen=True)
class Pair:
    """A release of transformers and one of torch; without, the torch that is here."""

    transformers: str
    torch: str | None = None

    def __str__(self) -> str:
        return self.transformers + (f" with torch {self.torch}" if self.torch else "")


class NotInstalled(Exception):
    """A pair that pip does not install here."""


def pinned() -> list[str]:
    """The releases of transformers in versions.txt, the oldest first."""
    lines = _PINNED.read_text().splitlines()
    return [line.removeprefix("transformers==") for line in lines if line.startswith("transformers==")]


def python_of(pair: Pair, folder: Path, say: Callable[[str], None] = lambda what: None) -> Path:
    """The interpreter of a pair's environment, which is made in `folder` where it is not there yet. Raises NotInstalled."""
    if pair.transformers == version("transformers") and pair.torch in (None, version("torch").partition("+")[0]):
        return Path(sys.executable)
    home = folder / "-torch".join(filter(None, (pair.transformers, pair.torch)))
    python, ready = home / "bin" / "python", home / "installed"
    if ready.exists():
        return python
    wanted = [f"transformers=={pair.transformers}", *([f"torch=={pair.torch}"] if pair.torch else [])]
    with _PIP:
        say(f"{pair}: installing into {home}")
        _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(home))
        here = sysconfig.get_path("purelib")
        packages = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
        (Path(packages) / "beneath.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        _run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *wanted)
        _run(str(python), "-c", "import torch, transformers; from transformers import LlamaForCausalLM")
    ready.touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"{command[0]} failed"]
        errors = [line for line in said if line.startswith("ERROR")]
        raise NotInstalled((errors or said)[-1].removeprefix("ERROR: "))
