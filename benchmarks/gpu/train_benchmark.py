"""What `make gpu-train` runs: whole training steps of LLaMA shapes on one GPU, shardcomp beside others, in one run.

    python benchmarks/gpu/train_benchmark.py [--dry-run] [--minutes 8.5] [--shapes 7b 1b 3b] [--variants shardcomp ...]
                                           [--results DIR]

Random weights, sequences of 4096, products in bf16, float32 masters, AdamW, gradients clipped. Every variant runs in a process
of its own, at the fastest of its settings (micro-batch, recompute, whether the bf16 copy of the weights stays) that fits in
memory. Reported are tokens per second, MFU in both conventions, the peak of memory, and where the time goes. A shape that does
not fit as a whole is measured with fewer of its layers, and the report says so. The file of results is written after every
variant. The exit status is 0 if all ran, 1 if some did not or were not reached, and 2 if this cannot run here.

--dry-run prints what would run, with what memory, and runs every variant once on a tiny shape on the CPU.
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
"""Seconds that the process of a variant may take: a compiled one, any other."""
WARM_UP, STEPS, MEASURED = 2, 7, 15.0
"""Steps that do not count, the most that do, and the seconds after which three are enough."""
TO_SPARE = 0.97
"""The share of a GPU's memory up to which a setting is tried."""


ALLOCATED_BY, ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
"""How torch takes a GPU's memory, for all variants: so that pieces of it that are free are not too small to be used; what the
environment says already stands."""


def fit(shape: Shape, memory: float) -> Shape:
    """The part of a shape that is measured on a GPU of so much memory."""
    return shape if shape.name == "tiny" else arithmetic.fitted(shape, memory)


def measure(variant: str, shape: Shape, memory: float, device_name: str, out: Path) -> None:
    """What the process of a variant does: run it at the first of its settings that fits, and write what it took."""
    import torch

    from variants import Absent, where

    device = torch.device(device_name)
    tried: list[dict[str, Any]] = []
    entry: dict[str, Any] = {"variant": variant, "shape": asdict(shape), "tried": tried}
    chosen = arithmetic.candidates(variant, shape, memory * TO_SPARE)
    if not chosen:
        parts.write(out, {**entry, "failed": f"no setting should fit in {memory / GB:.0f} GB"})
    for setting in chosen:
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
            parts.write(out, entry | measured)
            parts.write(out, where(run, tokens, device))
            return
        gc.collect()
        torch.cuda.empty_cache()


def timed(variant: str, shape: Shape, setting: Setting, device: Any) -> tuple[dict[str, Any], Any, Any]:
    """Steps of a variant at one setting: what they took, and what ran them on which tokens."""
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
    before = time.perf_counter() - began
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"] if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    took: list[float] = []
    while len(took) < STEPS and (len(took) < 3 or sum(took) < MEASURED):
        seconds, loss = step()
        took.append(seconds)
        losses.append(loss)
    low, median, high = statistics.quantiles(took, n=4)
    speed = shape.sequences * shape.seq / median
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    return (
        {
            "setting": asdict(setting),
            "estimated_memory": arithmetic.memory(variant, shape, setting),
            "parameters": run.parameters,
            "attention": run.attention,
            "before_seconds": before,
            "step": {"median": median, "spread": high - low, "every": took},
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
    """The processes, in order: all variants of the first shape first."""
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
    """The result of a process as one entry: how it ended, and what it measured before."""
    shape, _, variant = ended.part.name.partition(" ")
    entry: dict[str, Any] = {"shape_name": shape, "variant": variant, **ended.as_dict()}
    for measured in ended.found:
        entry.pop("failed", None)
        entry |= measured
    return entry


def told(entry: dict[str, Any]) -> str:
    """One line on a variant."""
    line = f"{entry['part']}: "
    if "step" in entry:
        setting, step, used = entry["setting"], entry["step"], entry["mfu"]
        line += f"{entry['tokens_per_second']:,.0f} tokens/s, step {step['median']:.3f} s ± {step['spread']:.3f}"
        if used["causal"] is not None:
            line += f", MFU {used['full_attention']:.1%} ({used['causal']:.1%} with causal attention)"
        if entry["peak_memory"] is not None:
            line += f", {entry['peak_memory'] / GB:.1f} GB"
        line += f", micro-batch {setting['micro_batch']}, recompute {setting['recompute']}"
    if "failed" in entry:
        line += entry["failed"]
    if entry["state"] != "done":
        line += f" {entry['state']}: {entry['why'].splitlines()[-1] if entry['why'] else ''}"
    return line


def tried(entry: dict[str, Any]) -> str:
    """One line on a variant that was only tried, without numbers that could be taken for measurements."""
    if "step" not in entry:
        return told(entry)
    return f"{entry['part']}: {entry['state']}, loss {entry['losses'][0]:.4f} to {entry['losses'][-1]:.4f}"


def alternatives(shape: Shape, memory: float) -> list[str]:
    """What is said of a shape and a GPU: how much of it is measured, and what else would fit."""
    part = fit(shape, memory)
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.2f} G parameters; float32 masters and moments, gradients and what is computed "
        f"with take {16 * shape.parameters / GB:.0f} to {18 * shape.parameters / GB:.0f} GB"
    ]
    if part.full:
        lines.append(
            f"  as a whole it does not fit in {memory / GB:.0f} GB: measured with {part.layers} of its {part.full} layers, "
            f"{part.parameters / 1e9:.2f} G parameters, for all variants alike. Not measured, being another training: weights, "
            f"gradients and moments in 16 bits would take {8 * shape.parameters / GB:.0f} GB; nor the optimizer on the host"
        )
    return lines


def say_plan(args: argparse.Namespace, memories: Mapping[str, float]) -> None:
    """What would run, and what it should take."""
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
            print(f"  {part.sequences} sequences of {part.seq} tokens a step; tried in turn, with the memory it should take:")
            for variant in args.variants:
                chosen = arithmetic.candidates(variant, part, memory * TO_SPARE)
                print(f"    {variant:<18} {'; '.join(_shown(variant, part, setting) for setting in chosen)}")


def _shown(variant: str, shape: Shape, setting: Setting) -> str:
    total = arithmetic.memory(variant, shape, setting)["total"]
    copy = "" if setting.gathered else ", no second copy"
    return f"micro-batch {setting.micro_batch}, recompute {setting.recompute}{copy}: {total / GB:.0f} GB"


def summary(entries: Sequence[dict[str, Any]], about: dict[str, Any], where: str) -> Any:
    """The short table."""
    from rich.table import Table

    table = Table(title=f"{about['device']}, commit {about['commit'][:12]}: {where}", title_justify="left")
    for column in ("shape", "variant"):
        table.add_column(column)
    for column in ("tokens/s", "step s", "±", "MFU", "causal", "GB", "micro-batch", "recompute", "where the time goes"):
        table.add_column(column, justify="right" if column not in ("recompute", "where the time goes") else "left")
    for entry in entries:
        if "step" not in entry:
            why = entry.get("failed") or f"{entry['state']}: {entry['why'].splitlines()[-1] if entry['why'] else ''}"
            table.add_row(entry["shape_name"], entry["variant"], *[""] * 8, why[:100])
            continue
        used, step, shape = entry["mfu"], entry["step"], entry["shape"]
        name = entry["shape_name"] + (f", {shape['layers']} of {shape['full']} layers" if shape["full"] else "")
        table.add_row(
            name,
            entry["variant"],
            f"{entry['tokens_per_second']:,.0f}",
            f"{step['median']:.3f}",
            f"{step['spread']:.3f}",
            *("" if used[key] is None else f"{used[key]:.1%}" for key in ("full_attention", "causal")),
            "" if entry["peak_memory"] is None else f"{entry['peak_memory'] / GB:.1f}",
            str(entry["setting"]["micro_batch"]),
            entry["setting"]["recompute"],
            shares(entry.get("time", {})),
        )
    return table


def shares(times: dict[str, float]) -> str:
    """Where the time of kernels goes, the largest share first."""
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ordered if seconds) if total else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run; run every variant on a tiny shape on the CPU"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for all variants together (default 8.5)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=parts.RESULTS, metavar="DIR", help="where the JSON file goes")
    for hidden, kind in (("--child", str), ("--out", Path), ("--bytes", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        parts.prepare()
        if args.child:
            os.environ.setdefault(ALLOCATED_BY, ALLOCATOR)
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
        print("\nevery variant once, on a tiny shape on the CPU, which says nothing of speed:", flush=True)
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
        print(told(entries[-1]) if path else tried(entries[-1]), flush=True)
        if ended.state == "failed":
            print(ended.why, flush=True)
        if path is not None:
            parts.save(path, {**about, "allocator": os.environ.get(ALLOCATED_BY, ALLOCATOR), "variants": entries})

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
