"""What `make gpu` runs: is everything right on this GPU, and how fast are its kernels?

    python benchmarks/gpu/check.py [--dry-run] [--minutes 8] [--results DIR]

One part after the other, each in a process of its own with its own time, the most important first: the library of kernels is
built; every operator is compared with float64 and with the bits of HuggingFace's modules; the operators are measured beside
HuggingFace, torch.compile, torch's own and Liger-Kernel; `shardcomp verify` runs on the GPU; compute-sanitizer, where it is
installed, watches every operator at small sizes. What the time did not suffice for is said. The last thing printed is a table;
everything is in one JSON file. Exit status: 0 all was right, 1 something was not or was not reached, 2 this cannot run here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import parts
from parts import Budget, Ended, Part, Refused

SECONDS = {"build": 150.0, "operators": 75.0, "kernels": 180.0, "verify": 100.0, "sanitizer": 90.0}
"""Part -> the most that it may take, in the order in which they run."""
MEANING = {
    "build": "builds the library of kernels, and asks what runs each operator (shardcomp env)",
    "operators": "every operator, forward and backward, against float64 and against the bits of HuggingFace's modules",
    "verify": "the plan against the dense model on the GPU: loss, gradients, weights",
    "kernels": "every operator beside HuggingFace, torch.compile, torch's own and Liger-Kernel",
    "sanitizer": "every operator at small sizes under compute-sanitizer's memcheck",
}
ROWS = 8192
MEASURED = (
    ("7b", ("rms_norm", "add_rms_norm", "swiglu", "rotary", "cross_entropy", "adamw")),
    ("llama3", ("cross_entropy",)),
    ("7b", ("linear_cross_entropy", "layer_norm")),
    ("llama3", ("linear_cross_entropy",)),
)
"""Shapes of the benchmark and their operators, in order: 8192 rows of 4096 and 11008, and vocabularies of 32000 and 128256."""
VERIFIED = ("fp64", "fp32", "bf16")
"""Precisions."""
REPEATED = 0.15
"""Seconds for which each call is repeated."""


def build(out: Path) -> None:
    """Load the library, which builds it, and call every operator."""
    from shardcomp.inspect.environment import environment
    from shardcomp.kernels import library

    loaded = library.load()
    parts.write(out, {"library": loaded.kind, "why": loaded.why})
    parts.write(out, {"kernels": [each for each in environment()["kernels"] if each["device"] != "cpu"]})


def operators(out: Path, small: bool) -> None:
    """Compare every operator."""
    import torch

    from correctness import SHAPES, checks

    for found in checks(torch.device("cuda"), ("tiny",) if small else tuple(SHAPES)):
        parts.write(out, asdict(found))
        torch.cuda.synchronize()


def verify(out: Path) -> None:
    """Verify a small model on one rank on the GPU."""
    import shardcomp

    for precision in VERIFIED:
        for more in ({}, {"recompute": "full", "zero": 3}):
            policy = shardcomp.Policy.load("llama", precision=precision, **more)
            try:
                found = shardcomp.verify("tiny", policy, 1, device="cuda").as_dict()
            except Exception as error:  # the other precisions are still worth knowing
                told = f"{precision} {more}: {type(error).__name__}: {str(error).strip()[-parts.TAIL :]}"
                parts.write(out, {"ok": False, "precision": precision, "reproduce": told})
                continue
            keys = ("ok", "precision", "deviation", "worst", "reproduce", "batches")
            parts.write(out, {key: found[key] for key in keys})


def kernels(out: Path) -> None:
    """Measure the operators."""
    import torch

    import benchmark

    setting = benchmark.Setting(torch.device("cuda"), torch.bfloat16, ROWS, REPEATED)
    bandwidth = benchmark.copied(setting)
    parts.write(out, {"copy_bytes_per_second": bandwidth})
    for name, wanted in MEASURED:
        for operator in wanted:
            for row in benchmark.rows(list(benchmark.cases(name, setting, {operator})), setting, bandwidth):
                parts.write(out, asdict(row))
            torch.cuda.empty_cache()


def planned(folder: Path) -> list[Part]:
    """All parts, in order. The sanitizer's is there where its program is."""
    script = str(Path(__file__).resolve())
    found = []
    for name, seconds in SECONDS.items():
        out = folder / f"{name}.jsonl"
        words = (script, "--part", name, "--out", str(out))
        program: tuple[str, ...] = ()
        if name == "sanitizer":
            tool = shutil.which("compute-sanitizer")
            if tool is None:
                continue
            program = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20")
        found.append(Part(name, words, seconds, out, program))
    return found


def one_part(name: str, out: Path) -> None:
    """What the process of a part does."""
    if name == "sanitizer":  # an allocation of its own for every tensor, so that what is beyond it is seen
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    runs: dict[str, Callable[[Path], None]] = {
        "build": build,
        "operators": lambda out: operators(out, small=False),
        "verify": verify,
        "kernels": kernels,
        "sanitizer": lambda out: operators(out, small=True),
    }
    runs[name](out)


def judged(ended: Sequence[Ended]) -> list[tuple[str, bool, str]]:
    """A verdict on each part: its name, whether it was reached and right, and in words what was found."""
    return [(each.part.name, *_judge(each)) for each in ended]


def _judge(ended: Ended) -> tuple[bool, str]:
    found, name, text = ended.found, ended.part.name, ""
    ok = ended.state == "done"
    if name == "build":
        found = found or [{"library": "reference", "why": "nothing was found out"}]
        held: list[dict[str, Any]] = next((each["kernels"] for each in found if "kernels" in each), [])
        fused = [each for each in held if each["name"] not in ("attention", "embedding")]
        there = [each["name"] for each in fused if each["ok"] and each["runs"] != "reference"]
        ok = ok and found[0]["library"] != "reference" and bool(there) and all(each["ok"] for each in fused)
        text = f"{found[0]['library']}: {found[0]['why']}; on this GPU it runs {len(there)} of {len(fused)} operators"
    elif name in ("operators", "sanitizer"):
        wrong = [f"{each['operator']} {each['shape']} {each['dtype']}: {each['why']}" for each in found if not each["ok"]]
        ok = ok and not wrong and bool(found)
        text = "; ".join([f"{len(found) - len(wrong)} of {len(found)} right", *wrong[:5]])
    elif name == "verify":
        wrong = [each["reproduce"] for each in found if not each["ok"]]
        ok = ok and not wrong and bool(found)
        text = "; ".join([f"{len(found) - len(wrong)} of {len(found)} agree", *wrong])
    elif name == "kernels":
        rows = [each for each in found if "operator" in each]
        text = f"{len(rows)} measured"
        mine = [each for each in rows if each["implementation"] == "shardcomp"]  # that others cannot do something is no error
        failed = [f"{each['operator']} {each['shape']}: {each['failed']}" for each in mine if each["failed"]]
        ok = ok and not failed and bool(rows)
        text = "; ".join([text, *failed])
    if ended.state != "done":
        text = "; ".join(filter(None, [text, f"{ended.state}: {ended.why.splitlines()[-1] if ended.why else ''}"]))
    return ok, text


def summary(ended: Sequence[Ended], about: dict[str, Any], path: Path) -> Any:
    """The short table: times of every operator, then what each part found."""
    from rich.console import Group
    from rich.table import Table

    rows = [each for part in ended if part.part.name == "kernels" for each in part.found if "operator" in each]
    names = list(dict.fromkeys(each["implementation"] for each in rows))
    title = f"{about['device']}, bf16, {ROWS} rows: forward / backward in µs, in brackets the share of a copy's bandwidth"
    times = Table(title=title, title_justify="left")
    for column in ("operator", "shape", *names):
        times.add_column(column, justify="left" if column in ("operator", "shape") else "right")
    for key in dict.fromkeys((each["operator"], each["shape"]) for each in rows):
        held = {each["implementation"]: each for each in rows if (each["operator"], each["shape"]) == key}
        times.add_row(*key, *(_cell(held[name]) if name in held else "" for name in names))
    verdicts = Table(title=f"{about['device']}, commit {about['commit'][:12]}: {path}", title_justify="left")
    for column in ("part", "", "seconds", "found"):
        verdicts.add_column(column)
    for (name, ok, text), each in zip(judged(ended), ended, strict=True):
        verdicts.add_row(name, "right" if ok else "NOT RIGHT", f"{each.seconds:.0f}", text)
    return Group(times, verdicts)


def _cell(row: dict[str, Any]) -> str:
    if row["failed"]:
        return "-"
    sides = [side for side in ("forward", "backward") if row[side] is not None]
    times = " / ".join(f"{row[side] * 1e6:.0f}" for side in sides)
    shares = " / ".join(f"{row[f'{side}_share']:.0%}" for side in sides if row[f"{side}_share"] is not None)
    return f"{times} ({shares})" if shares else times


def say_plan(minutes: float) -> None:
    """What would run."""
    import torch

    import benchmark

    print(f"a dry run: nothing is measured. On a GPU this would run, within {minutes:g} minutes, in this order:")
    for name, seconds in SECONDS.items():
        print(f"  {name:<10} at most {seconds:.0f} s: {MEANING[name]}")
        if name == "verify":
            print(f"{'':13}preset tiny, one rank, {', '.join(VERIFIED)}, plain and with recompute = full and zero = 3")
        if name == "kernels":
            for shape, wanted in MEASURED:
                print(f"{'':13}{shape}: {', '.join(f'{each} {_sizes(shape, each)}' for each in wanted)}")
        if name == "sanitizer" and shutil.which("compute-sanitizer") is None:
            print(f"{'':13}compute-sanitizer is not installed here")
    largest, where = 0, ""
    setting = benchmark.Setting(torch.device("meta"), torch.bfloat16, ROWS, REPEATED)
    for shape, wanted in MEASURED:
        for case in benchmark.cases(shape, setting, set(wanted) - {"adamw"}):
            held = sum(each.nbytes for each in case.make())
            largest, where = max((largest, where), (held, f"{case.operator} {shape}"))
    print(
        f"operands take up to {largest / 1e9:.1f} GB ({where}), with what a model keeps for its backward about ten times that"
    )
    print("nothing was measured")


def _sizes(shape: str, operator: str) -> str:
    import benchmark

    held = benchmark.SHAPES[shape]
    if operator == "adamw":
        return f"{4 * held.hidden**2 / 1e6:.0f} M numbers"
    if operator == "rotary":
        return f"{ROWS} × {held.heads} heads × {held.head}"
    last = {"swiglu": held.inner, "cross_entropy": held.words, "linear_cross_entropy": f"{held.hidden} × {held.words}"}
    return f"{ROWS} × {last.get(operator, held.hidden)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and measure nothing")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together (default 7.5)")
    parser.add_argument("--results", type=Path, default=parts.RESULTS, metavar="DIR", help="where the JSON file goes")
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    try:
        parts.prepare()
        if asked.part:
            one_part(asked.part, asked.out)
            return 0
        parts.need_gpu(asked.dry_run)
    except Refused as refused:
        print(f"check.py: {refused}", file=sys.stderr)
        return 2
    if asked.dry_run:
        say_plan(asked.minutes)
        return 0
    about = parts.about()
    path = parts.result_file(asked.results, "kernels", about)
    print(
        f"{about['device']}, driver {about['driver']}, torch {about['versions']['torch']}, commit {about['commit']}", flush=True
    )
    ended: list[Ended] = []

    def after(each: Ended) -> None:
        ended.append(each)
        [(name, ok, text)] = judged([each])
        print(f"{name}: {'right' if ok else 'NOT RIGHT'}, {each.seconds:.0f} s: {text}", flush=True)
        if each.state == "failed":
            print(each.why, flush=True)
        parts.save(path, {**about, "parts": [{**e.as_dict(), "found": e.found} for e in ended]})

    with tempfile.TemporaryDirectory() as folder:
        Budget(asked.minutes * 60).run(planned(Path(folder)), after)
    if shutil.which("compute-sanitizer") is None:
        print("sanitizer: compute-sanitizer is not installed", flush=True)
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(summary(ended, about, path))
    return 0 if all(ok for _, ok, _ in judged(ended)) else 1


if __name__ == "__main__":
    sys.exit(main())
