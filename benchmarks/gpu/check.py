"""`make gpu`: check that everything is right on this GPU, and measure its kernels.

    python benchmarks/gpu/check.py [--dry-run] [--minutes 8] [--results DIR]

The parts run one after the other, the most important first. Each has a process and a time limit:

    build      build the library of kernels
    operators  compare every operator with float64, and with the bits of HuggingFace's modules
    kernels    measure the operators beside HuggingFace, torch.compile, torch's operators and Liger-Kernel
    verify     run `shardcomp verify` on the GPU
    sanitizer  run every operator at small sizes under compute-sanitizer, if that is installed

The report also lists the parts for which no time was left. It ends with a table, and one JSON file has all results. The exit
status is 0 if everything is right, 1 if something is wrong or was not reached, and 2 if the check cannot run here.
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
"""Part -> its time limit, in the order in which they run."""
MEANING = {
    "build": "builds the library of kernels, and lists what runs each operator (shardcomp env)",
    "operators": "every operator, forward and backward, against float64 and against the bits of HuggingFace's modules",
    "verify": "the plan against the dense model on the GPU: loss, gradients, weights",
    "kernels": "every operator beside HuggingFace, torch.compile, torch's operators and Liger-Kernel",
    "sanitizer": "every operator at small sizes under compute-sanitizer's memcheck",
}
ROWS = 8192
MEASURED = (
    ("7b", ("rms_norm", "add_rms_norm", "swiglu", "rotary", "cross_entropy", "adamw")),
    ("llama3", ("cross_entropy",)),
    ("7b", ("linear_cross_entropy", "layer_norm")),
    ("llama3", ("linear_cross_entropy",)),
)
"""(shape of the benchmark, its operators), in the order in which they are measured. 7b has rows of 4096 and 11008 features.
Its vocabulary is 32000, that of llama3 is 128256."""
VERIFIED = ("fp64", "fp32", "bf16")
"""The precisions that `verify` runs in."""
REPEATED = 0.15
"""How long the benchmark repeats a call, in seconds."""


def build(out: Path) -> None:
    """Load the library, which builds it if necessary, and ask what runs each operator."""
    from shardcomp.inspect.environment import environment
    from shardcomp.kernels import library

    loaded = library.load()
    parts.write(out, {"library": loaded.kind, "why": loaded.why})
    parts.write(out, {"kernels": [kernel for kernel in environment()["kernels"] if kernel["device"] != "cpu"]})


def operators(out: Path, small: bool) -> None:
    """Compare every operator."""
    import torch

    from correctness import SHAPES, checks

    for check in checks(torch.device("cuda"), ("tiny",) if small else tuple(SHAPES)):
        parts.write(out, asdict(check))
        torch.cuda.synchronize()  # an error of a kernel is raised beside the check that caused it


def verify(out: Path) -> None:
    """Verify a small model on one rank on the GPU."""
    import shardcomp

    for precision in VERIFIED:
        for options in ({}, {"recompute": "full", "zero": 3}):
            policy = shardcomp.Policy.load("llama", precision=precision, **options)
            try:
                answer = shardcomp.verify("tiny", policy, 1, device="cuda").as_dict()
            except Exception as error:  # the other precisions run all the same
                text = f"{precision} {options}: {type(error).__name__}: {str(error).strip()[-parts.TAIL :]}"
                parts.write(out, {"ok": False, "precision": precision, "reproduce": text})
                continue
            keys = ("ok", "precision", "deviation", "worst", "reproduce", "batches")
            parts.write(out, {key: answer[key] for key in keys})


def kernels(out: Path) -> None:
    """Measure the operators."""
    import torch

    import benchmark

    setting = benchmark.Setting(torch.device("cuda"), torch.bfloat16, ROWS, REPEATED)
    bandwidth = benchmark.copied(setting)
    parts.write(out, {"copy_bytes_per_second": bandwidth})
    for name, names in MEASURED:
        for operator in names:
            for row in benchmark.rows(list(benchmark.cases(name, setting, {operator})), setting, bandwidth):
                parts.write(out, asdict(row))
            torch.cuda.empty_cache()


def planned(folder: Path) -> list[Part]:
    """All parts, in order. The sanitizer is one of them if compute-sanitizer is installed."""
    script = str(Path(__file__).resolve())
    result = []
    for name, seconds in SECONDS.items():
        out = folder / f"{name}.jsonl"
        words = (script, "--part", name, "--out", str(out))
        program: tuple[str, ...] = ()
        if name == "sanitizer":
            tool = shutil.which("compute-sanitizer")
            if tool is None:
                continue
            program = (tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20")
        result.append(Part(name, words, seconds, out, program))
    return result


def one_part(name: str, out: Path) -> None:
    """Run a part in this process."""
    if name == "sanitizer":
        # Torch's allocator puts many tensors into one block. Only where each has its own allocation does the tool see an access
        # beyond a tensor.
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
    """A verdict for every part: its name, whether it ran and all its results are right, and a summary of them in words."""
    return [(part.part.name, *_judge(part)) for part in ended]


def _judge(ended: Ended) -> tuple[bool, str]:
    results, name, text = ended.found, ended.part.name, ""
    ok = ended.state == "done"
    if name == "build":
        results = results or [{"library": "reference", "why": "the part wrote no result"}]
        kernels: list[dict[str, Any]] = next((result["kernels"] for result in results if "kernels" in result), [])
        fused = [kernel for kernel in kernels if kernel["name"] not in ("attention", "embedding")]
        running = [kernel["name"] for kernel in fused if kernel["ok"] and kernel["runs"] != "reference"]
        library = results[0]
        ok = ok and library["library"] != "reference" and bool(running) and all(kernel["ok"] for kernel in fused)
        text = f"{library['library']}: {library['why']}; on this GPU it runs {len(running)} of {len(fused)} operators"
    elif name in ("operators", "sanitizer"):
        wrong = [
            f"{check['operator']} {check['shape']} {check['dtype']}: {check['why']}" for check in results if not check["ok"]
        ]
        ok = ok and not wrong and bool(results)
        text = "; ".join([f"{len(results) - len(wrong)} of {len(results)} right", *wrong[:5]])
    elif name == "verify":
        wrong = [answer["reproduce"] for answer in results if not answer["ok"]]
        ok = ok and not wrong and bool(results)
        text = "; ".join([f"{len(results) - len(wrong)} of {len(results)} agree", *wrong])
    elif name == "kernels":
        rows = [row for row in results if "operator" in row]
        text = f"{len(rows)} measured"
        own = [row for row in rows if row["implementation"] == "shardcomp"]  # the others may fail
        failed = [f"{row['operator']} {row['shape']}: {row['failed']}" for row in own if row["failed"]]
        ok = ok and not failed and bool(rows)
        text = "; ".join([text, *failed])
    if ended.state != "done":
        text = "; ".join(filter(None, [text, f"{ended.state}: {ended.why.splitlines()[-1] if ended.why else ''}"]))
    return ok, text


def summary(ended: Sequence[Ended], about: dict[str, Any], path: Path) -> Any:
    """The tables at the end of the report: the times of every operator, and the verdicts of the parts."""
    from rich.console import Group
    from rich.table import Table

    rows = [row for part in ended if part.part.name == "kernels" for row in part.found if "operator" in row]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    title = f"{about['device']}, bf16, {ROWS} rows: forward / backward in µs, in brackets their shares of a copy's bandwidth"
    times = Table(title=title, title_justify="left")
    for column in ("operator", "shape", *names):
        times.add_column(column, justify="left" if column in ("operator", "shape") else "right")
    for key in dict.fromkeys((row["operator"], row["shape"]) for row in rows):
        measured = {row["implementation"]: row for row in rows if (row["operator"], row["shape"]) == key}
        times.add_row(*key, *(_cell(measured[name]) if name in measured else "" for name in names))
    verdicts = Table(title=f"{about['device']}, commit {about['commit'][:12]}: {path}", title_justify="left")
    for column in ("part", "", "seconds", "result"):
        verdicts.add_column(column)
    for (name, ok, text), part in zip(judged(ended), ended, strict=True):
        verdicts.add_row(name, "right" if ok else "NOT RIGHT", f"{part.seconds:.0f}", text)
    return Group(times, verdicts)


def _cell(row: dict[str, Any]) -> str:
    if row["failed"]:
        return "-"
    sides = [side for side in ("forward", "backward") if row[side] is not None]
    times = " / ".join(f"{row[side] * 1e6:.0f}" for side in sides)
    shares = " / ".join(f"{row[f'{side}_share']:.0%}" for side in sides if row[f"{side}_share"] is not None)
    return f"{times} ({shares})" if shares else times


def say_plan(minutes: float) -> None:
    """Print what would run on a GPU."""
    import torch

    import benchmark

    print(f"a dry run: nothing is measured. On a GPU this would run, within {minutes:g} minutes, in this order:")
    for name, seconds in SECONDS.items():
        print(f"  {name:<10} at most {seconds:.0f} s: {MEANING[name]}")
        if name == "verify":
            print(f"{'':13}preset tiny, one rank, {', '.join(VERIFIED)}, plain and with recompute = full and zero = 3")
        if name == "kernels":
            for shape, names in MEASURED:
                print(f"{'':13}{shape}: {', '.join(f'{operator} {_sizes(shape, operator)}' for operator in names)}")
        if name == "sanitizer" and shutil.which("compute-sanitizer") is None:
            print(f"{'':13}compute-sanitizer is not installed here")
    largest, largest_case = 0, ""
    setting = benchmark.Setting(torch.device("meta"), torch.bfloat16, ROWS, REPEATED)
    for shape, names in MEASURED:
        for case in benchmark.cases(shape, setting, set(names) - {"adamw"}):
            nbytes = sum(operand.nbytes for operand in case.make())
            largest, largest_case = max((largest, largest_case), (nbytes, f"{case.operator} {shape}"))
    print(f"operands take up to {largest / 1e9:.1f} GB ({largest_case}), and about ten times as much with a backward")
    print("nothing was measured")


def _sizes(shape: str, operator: str) -> str:
    """The sizes of an operator's operands, as the dry run prints them."""
    import benchmark

    sizes = benchmark.SHAPES[shape]
    if operator == "adamw":
        return f"{4 * sizes.hidden**2 / 1e6:.0f} M numbers"
    if operator == "rotary":
        return f"{ROWS} × {sizes.heads} heads × {sizes.head}"
    last = {"swiglu": sizes.inner, "cross_entropy": sizes.words, "linear_cross_entropy": f"{sizes.hidden} × {sizes.words}"}
    return f"{ROWS} × {last.get(operator, sizes.hidden)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and measure nothing")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit of all parts together (default 7.5)")
    parser.add_argument("--results", type=Path, default=parts.RESULTS, metavar="DIR", help="where the JSON file goes")
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        parts.prepare()
        if args.part:
            one_part(args.part, args.out)
            return 0
        parts.need_gpu(args.dry_run)
    except Refused as refused:
        print(f"check.py: {refused}", file=sys.stderr)
        return 2
    if args.dry_run:
        say_plan(args.minutes)
        return 0
    about = parts.about()
    path = parts.result_file(args.results, "kernels", about)
    print(
        f"{about['device']}, driver {about['driver']}, torch {about['versions']['torch']}, commit {about['commit']}", flush=True
    )
    ended: list[Ended] = []

    def after(part: Ended) -> None:
        ended.append(part)
        [(name, ok, text)] = judged([part])
        print(f"{name}: {'right' if ok else 'NOT RIGHT'}, {part.seconds:.0f} s: {text}", flush=True)
        if part.state == "failed":
            print(part.why, flush=True)
        parts.save(path, {**about, "parts": [{**part.as_dict(), "found": part.found} for part in ended]})

    with tempfile.TemporaryDirectory() as folder:
        Budget(args.minutes * 60).run(planned(Path(folder)), after)
    if shutil.which("compute-sanitizer") is None:
        print("sanitizer: compute-sanitizer is not installed", flush=True)
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=160)).print(summary(ended, about, path))
    return 0 if all(ok for _, ok, _ in judged(ended)) else 1


if __name__ == "__main__":
    sys.exit(main())
