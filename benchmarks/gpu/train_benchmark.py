"""`make gpu-train`: measure whole training steps of LLaMA shapes on one GPU, shardcomp beside others, in one run.

    python benchmarks/gpu/train_benchmark.py [--dry-run] [--minutes 8.5] [--shapes 7b 1b 3b] [--variants shardcomp ...]
                                           [--results DIR]

Every variant trains with random weights, sequences of 4096 tokens, matrix products in bf16, float32 masters, AdamW and clipped
gradients. It has its own process, and runs at the fastest setting that fits in memory. A setting is a micro-batch, a kind of
recompute, and whether the bf16 copy of the weights stays between forward and backward.

The report has tokens per second, MFU in two conventions, the peak of memory, and the shares of a step's time. If a shape does
not fit, fewer of its layers are measured, and the report says so. The file of results is written after every variant. The exit
status is 0 if every variant ran, 1 if some failed or were not reached, and 2 if the benchmark cannot run here.

--dry-run prints what would run and how much memory it should take. It also runs every variant once, on a tiny shape on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import arithmetic
import parts
from arithmetic import GB, MEANING, SHAPES, VARIANTS, Setting, Shape
from parts import Budget, Ended, Part, Refused

LIMITS = {"hf-compile": 100.0, "shardcomp-compile": 100.0}
LIMIT = 70.0
"""How long the process of a variant may take, in seconds: LIMITS for those that compile, LIMIT for the others."""
WARM_UP, STEPS, MEASURED = 2, 7, 15.0
"""The number of steps that are not measured, the largest number that is, and the seconds after which three are enough."""
USABLE = 0.97
"""A setting is tried if its estimate is at most this share of the GPU's memory."""
ALLOCATOR_VARIABLE, ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""The setting of torch's allocator for all variants, unless the environment has one. It keeps free memory from being split into
blocks that are too small to use."""


def fit(shape: Shape, memory: float) -> Shape:
    """The shape, or with fewer layers the part of it that fits in `memory` bytes for every variant."""
    return shape if shape.name == "tiny" else arithmetic.fitted(shape, memory)


def measure(variant: str, shape: Shape, memory: float, device_name: str, out: Path) -> None:
    """Run a variant at the first of its settings that fits, and write its measurements. The process of a variant does this."""
    import torch

    from variants import Absent, time_shares

    device = torch.device(device_name)
    tried: list[dict[str, Any]] = []
    entry: dict[str, Any] = {"variant": variant, "shape": asdict(shape), "tried": tried}
    candidates = arithmetic.candidates(variant, shape, memory * USABLE)
    if not candidates:
        parts.write(out, {**entry, "failed": f"no setting should fit in {memory / GB:.0f} GB"})
    for setting in candidates:
        try:
            measured, run, tokens = timed(variant, shape, setting, device)
        except Absent as absent:
            parts.write(out, {**entry, "failed": str(absent)})
            return
        except RuntimeError as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            tried.append({**asdict(setting), "why": str(error).partition("\n")[0]})
            parts.write(out, {**entry, "failed": "it fits at no setting that was tried"})
        else:
            parts.write(out, entry | measured)  # at once: the profile below may run out of time
            parts.write(out, time_shares(run, tokens, device))
            return
        gc.collect()
        torch.cuda.empty_cache()


def timed(variant: str, shape: Shape, setting: Setting, device: Any) -> tuple[dict[str, Any], Any, Any]:
    """Run and time the steps of a variant at one setting. Returns the measurements, the trainer, and its tokens."""
    import torch

    from variants import trainer

    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    began = time.perf_counter()
    run = trainer(variant, shape, setting, device)
    tokens = torch.randint(0, shape.words, (shape.sequences, shape.seq), device=device)

    def step() -> tuple[float, Any]:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        loss = run.gradients(tokens)
        run.update()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, loss

    losses = [step()[1] for _ in range(WARM_UP)]
    start_seconds = time.perf_counter() - began
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"] if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while len(times) < STEPS and (len(times) < 3 or sum(times) < MEASURED):
        seconds, loss = step()
        times.append(seconds)
        losses.append(loss)
    low, median, high = statistics.quantiles(times, n=4)
    speed = shape.sequences * shape.seq / median
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    return (
        {
            "setting": asdict(setting),
            "estimated_memory": arithmetic.memory(variant, shape, setting),
            "parameters": run.parameters,
            "attention": run.attention,
            "before_seconds": start_seconds,
            "step": {"median": median, "spread": high - low, "every": times},
            "tokens_per_second": speed,
            "mfu": arithmetic.mfu(shape, speed, name),
            "peak_memory": torch.cuda.max_memory_allocated(device) if on_gpu else None,
            "reserved_memory": torch.cuda.max_memory_reserved(device) if on_gpu else None,
            "memory_retries": torch.cuda.memory_stats(device)["num_alloc_retries"] - retries if on_gpu else None,
            "losses": [float(loss) for loss in losses],
        },
        run,
        tokens,
    )


def planned(shapes: Sequence[str], variants: Sequence[str], memory: float, device: str, folder: Path) -> list[Part]:
    """The parts, one for each variant of each shape. All variants of the first shape come first."""
    script, planned_parts = str(Path(__file__).resolve()), []
    for shape in shapes:
        for variant in variants:
            out = folder / f"{shape}-{variant}.jsonl"
            words = (
                script,
                "--shapes",
                shape,
                "--variants",
                variant,
                "--child",
                device,
                "--out",
                str(out),
                "--bytes",
                str(memory),
            )
            planned_parts.append(Part(f"{shape} {variant}", words, LIMITS.get(variant, LIMIT), out))
    return planned_parts


def result(ended: Ended) -> dict[str, Any]:
    """The entry of a variant in the file of results: how its process ended, and what it measured before that."""
    shape, _, variant = ended.part.name.partition(" ")
    entry: dict[str, Any] = {"shape_name": shape, "variant": variant, **ended.as_dict()}
    for measured in ended.found:
        entry.pop("failed", None)  # of an earlier setting, which did not fit
        entry |= measured
    return entry


def describe(entry: dict[str, Any]) -> str:
    """One line about a variant, with its measurements."""
    line = f"{entry['part']}: "
    if "step" in entry:
        setting, step, mfu = entry["setting"], entry["step"], entry["mfu"]
        line += f"{entry['tokens_per_second']:,.0f} tokens/s, step {step['median']:.3f} s ± {step['spread']:.3f}"
        if mfu["causal"] is not None:
            line += f", MFU {mfu['full_attention']:.1%} ({mfu['causal']:.1%} with causal attention)"
        if entry["peak_memory"] is not None:
            line += f", {entry['peak_memory'] / GB:.1f} GB"
        line += f", micro-batch {setting['micro_batch']}, recompute {setting['recompute']}"
    if "failed" in entry:
        line += entry["failed"]
    if entry["state"] != "done":
        line += f" {entry['state']}: {entry['why'].splitlines()[-1] if entry['why'] else ''}"
    return line


def describe_trial(entry: dict[str, Any]) -> str:
    """One line about a variant of a dry run. It has no numbers that could be mistaken for measurements."""
    if "step" not in entry:
        return describe(entry)
    return f"{entry['part']}: {entry['state']}, loss {entry['losses'][0]:.4f} to {entry['losses'][-1]:.4f}"


def alternatives(shape: Shape, memory: float) -> list[str]:
    """Lines about a shape on a GPU: its memory, how many of its layers are measured, and what else would fit."""
    part = fit(shape, memory)
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.2f} G parameters; float32 masters and moments, gradients and bf16 copies take "
        f"{16 * shape.parameters / GB:.0f} to {18 * shape.parameters / GB:.0f} GB"
    ]
    if part.full:
        lines.append(
            f"  the whole model does not fit in {memory / GB:.0f} GB: every variant is measured with {part.layers} of its "
            f"{part.full} layers, {part.parameters / 1e9:.2f} G parameters. Not measured, since they train differently: "
            f"everything in 16 bits, which would take {8 * shape.parameters / GB:.0f} GB, and the optimizer on the host"
        )
    return lines


def say_plan(args: argparse.Namespace, memories: Mapping[str, float]) -> None:
    """Print what would run on these GPUs, and how much memory it should take."""
    order = ", ".join(f"{shape} {variant}" for shape in args.shapes for variant in args.variants)
    print("a dry run: nothing is measured")
    print(f"on a GPU this would run, within {args.minutes:g} minutes, in this order: {order}")
    for variant in args.variants:
        print(f"  {variant:<18} at most {LIMITS.get(variant, LIMIT):.0f} s: {MEANING[variant]}")
    for name, memory in memories.items():
        print(f"\n{name}, {memory / GB:.0f} GB")
        for shape in (SHAPES[name] for name in args.shapes):
            for line in alternatives(shape, memory):
                print(line)
            part = fit(shape, memory)
            print(f"  {part.sequences} sequences of {part.seq} tokens a step; settings to try in turn, with estimated memory:")
            for variant in args.variants:
                candidates = arithmetic.candidates(variant, part, memory * USABLE)
                print(f"    {variant:<18} {'; '.join(_in_words(variant, part, setting) for setting in candidates)}")


def _in_words(variant: str, shape: Shape, setting: Setting) -> str:
    total = arithmetic.memory(variant, shape, setting)["total"]
    copy = "" if setting.gathered else ", no bf16 copy"
    return f"micro-batch {setting.micro_batch}, recompute {setting.recompute}{copy}: {total / GB:.0f} GB"


def summary(entries: Sequence[dict[str, Any]], about: dict[str, Any], path: str) -> Any:
    """The table at the end of the report."""
    from rich.table import Table

    table = Table(title=f"{about['device']}, commit {about['commit'][:12]}: {path}", title_justify="left")
    for column in ("shape", "variant"):
        table.add_column(column)
    for column in ("tokens/s", "step s", "±", "MFU", "causal", "GB", "micro-batch", "recompute", "time by kind of kernel"):
        table.add_column(column, justify="right" if column not in ("recompute", "time by kind of kernel") else "left")
    for entry in entries:
        if "step" not in entry:
            why = entry.get("failed") or f"{entry['state']}: {entry['why'].splitlines()[-1] if entry['why'] else ''}"
            table.add_row(entry["shape_name"], entry["variant"], *[""] * 8, why[:100])
            continue
        mfu, step, shape = entry["mfu"], entry["step"], entry["shape"]
        name = entry["shape_name"] + (f", {shape['layers']} of {shape['full']} layers" if shape["full"] else "")
        table.add_row(
            name,
            entry["variant"],
            f"{entry['tokens_per_second']:,.0f}",
            f"{step['median']:.3f}",
            f"{step['spread']:.3f}",
            *("" if mfu[key] is None else f"{mfu[key]:.1%}" for key in ("full_attention", "causal")),
            "" if entry["peak_memory"] is None else f"{entry['peak_memory'] / GB:.1f}",
            str(entry["setting"]["micro_batch"]),
            entry["setting"]["recompute"],
            shares(entry.get("time", {})),
        )
    return table


def shares(times: dict[str, float]) -> str:
    """The share of each kind of kernel in the time of all, the largest first. times: kind -> seconds."""
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ordered if seconds) if total else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run; run every variant on a tiny shape on the CPU"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of all variants together (default 8.5)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=parts.RESULTS, metavar="DIR", help="where the JSON file goes")
    for hidden, kind in (("--child", str), ("--out", Path), ("--bytes", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        parts.prepare()
        if args.child:
            os.environ.setdefault(ALLOCATOR_VARIABLE, ALLOCATOR)
            [name], [variant] = args.shapes, args.variants
            measure(variant, fit(SHAPES[name], args.bytes), args.bytes, args.child, args.out)
            return 0
        parts.need_gpu(args.dry_run)
    except Refused as refused:
        print(f"train_benchmark.py: {refused}", file=sys.stderr)
        return 2
    about = parts.about()
    if args.dry_run:
        say_plan(args, arithmetic.MEMORY)
        print("\nevery variant once, on a tiny shape on the CPU, which says nothing about speed:", flush=True)
        shapes, device, memory, path = ["tiny"], "cpu", 80 * GB, None
    else:
        shapes, device, memory = args.shapes, "cuda", float(about["memory"])
        path = parts.result_file(args.results, "train", about)
        print(f"{about['device']}, driver {about['driver']}, torch {about['versions']['torch']}, commit {about['commit']}")
        for shape in shapes:
            print("\n".join(alternatives(SHAPES[shape], memory)), flush=True)
    entries: list[dict[str, Any]] = []

    def after(ended: Ended) -> None:
        entries.append(result(ended))
        print(describe(entries[-1]) if path else describe_trial(entries[-1]), flush=True)
        if ended.state == "failed":
            print(ended.why, flush=True)
        if path is not None:
            parts.save(path, {**about, "allocator": os.environ.get(ALLOCATOR_VARIABLE, ALLOCATOR), "variants": entries})

    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(args.minutes * 60, least=20.0)
        budget.run(planned(shapes, args.variants, memory, device, Path(folder)), after)
    if path is None:
        print("nothing was measured")
    else:
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=170)).print(summary(entries, about, str(path)))
    ran = (entry["state"] == "done" and (path is None or "step" in entry or "failed" in entry) for entry in entries)
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
