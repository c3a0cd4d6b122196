"""Every kind of model under every release that is supported: `make matrix`.

Each release has an environment of its own. There each kind of model is captured and verified, and its operators and its listing
are compared with those of the newest release. Exits with 1 where a model fails, or where a pinned release does not install.
Takes about a quarter of a minute for each model and release.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from system.matrix.comparison import failed, notes, table
from system.matrix.environments import NotInstalled, Pair, pinned, python_of

from support.families import GATE, MORE

ROOT = Path(__file__).parents[3]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--versions", nargs="+", default=pinned(), help="releases of transformers (default: those pinned)")
    parser.add_argument("--torch", nargs="+", default=[], help="releases of torch to run beside the one that is here")
    kinds = [*GATE, *MORE]
    parser.add_argument(
        "--models", nargs="+", default=kinds, choices=kinds, metavar="KIND", help="as in tests/support/families.py"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments are")
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time")
    parser.add_argument("--seconds", type=float, default=300, help="what each model may take")
    options = parser.parse_args(arguments)
    versions = sorted(dict.fromkeys(options.versions), key=_number)
    pairs = [Pair(version, torch) for version in versions for torch in (None, *options.torch)]
    pairs.sort(key=lambda pair: (pair.torch is None, _number(pair.transformers)))  # what is here and newest comes last
    progress = Progress(len(pairs) * len(options.models))
    results: dict[str, dict[str, Any]] = {}
    untested: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for pair, outcome in zip(pairs, pool.map(lambda pair: _outcome(pair, options, progress), pairs), strict=True):
            if isinstance(outcome, dict):
                results[str(pair)] = outcome
            else:
                untested[str(pair)] = outcome
            if options.json:  # after every release: a run takes long
                options.json.write_text(json.dumps({"results": results, "untested": untested}, indent=1, ensure_ascii=False))
    print(table(results))
    print("\n" + notes(results))
    for name, why in untested.items():
        print(f"\nNot tested: {name}: {why}")
    missing = any(pair.torch is None for pair in pairs if str(pair) in untested)
    return int(missing or any(failed(found) for models in results.values() for found in models.values()))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class Progress:
    """Says on stderr what is done, and about how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._began = time.perf_counter()
        self._lock = threading.Lock()

    def step(self, what: str, count: int = 1) -> None:
        """`count` more models are done."""
        with self._lock:
            self.done += count
            left = (time.perf_counter() - self._began) / self.done * (self.total - self.done)
            self.say(f"[{self.done}/{self.total}, {left / 60:.0f} min left] {what}")

    @staticmethod
    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)


def _outcome(pair: Pair, options: argparse.Namespace, progress: Progress) -> dict[str, Any] | str:
    """By model what was found; or why the pair could not be tested."""
    try:
        python = python_of(pair, options.folder, progress.say)
    except NotInstalled as problem:
        progress.step(f"{pair}: does not install here", len(options.models))
        return f"does not install here: {problem}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    asked = json.dumps({"models": options.models, "seconds": options.seconds})
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        command = [str(python), "-m", "matrix.one"]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings, cwd=ROOT
        )
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(asked)
        worker.stdin.close()
        for line in worker.stdout:
            one = json.loads(line)
            found[one.pop("model")] = one
            state = "absent" if one.get("absent") else "FAILED" if failed(one) else "ok"
            progress.step(f"{pair} {list(found)[-1]}: {state}, {one['seconds']} s")
        if worker.wait():
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["nothing"]
            missing = {"error": f"the process ended with code {worker.returncode}: {said[-1]}"}
            lost = [model for model in options.models if model not in found]
            found |= dict.fromkeys(lost, missing)
            progress.step(f"{pair}: FAILED, {missing['error']}", len(lost))
    return found


if __name__ == "__main__":
    sys.exit(main())
