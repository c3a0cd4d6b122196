"""The same training step through shardcomp and its peers, interleaved in one run: `make compare`.

    python benchmarks/compare.py --quick                 # a small model, under 5 minutes on two cores
    python benchmarks/compare.py --only "one rank" --precision fp32 --micro-batches 1 4
    python benchmarks/compare.py --device cuda --hidden 2048 --layers 16 --seq 4096

Each contender of `contenders.py` runs in processes of its own. Within a topology they take turns, a few steps each, so that a
busy moment of the machine hits all of them. Before them, HuggingFace in float32 on one rank gives the loss curve that the
others should stay on. The table says for each: tokens a second (median and quartiles over the steps), CPU seconds of all ranks
a step, peak bytes of live tensors and peak resident memory of the largest rank, seconds from an empty process to the first
step, and how far its losses are from that curve.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # before torch is imported: set-up counts imports
ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "liger-kernel")
QUICK = {"hidden": 256, "layers": 4, "heads": 8, "vocab": 4096, "seq": 128, "sequences": 8, "rounds": 3}
PATIENCE = 300
"""Seconds that a set-up or a turn may take before its contender is given up."""


# A rank of a contender ----------------------------------------------------------------------------------------------------


def serve(name: str, work: dict[str, Any]) -> None:
    """Set a contender up in this process, and answer the lines of stdin: `steps FIRST COUNT`, `memory`, `end`."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from contenders import CONTENDERS, Absent, Workload

    workload = Workload(**work)
    contender = next(row for row in CONTENDERS if row.name == name)
    rank = int(os.environ["RANK"])
    imported = time.perf_counter() - BEGAN
    try:
        trainer = contender.make(workload)
    except Absent as reason:
        return answer(absent=str(reason))
    built = time.perf_counter() - BEGAN

    def run(index: int) -> tuple[float, float, float]:
        tokens = workload.batch(index)
        if trainer.data_ranks > 1:
            tokens = tokens.chunk(trainer.data_ranks)[rank]
        _synchronize(workload.device)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(trainer.step(tokens))
        _synchronize(workload.device)
        return time.perf_counter() - wall, time.process_time() - cpu, loss

    _, _, loss = run(0)
    answer(imported=imported, built=built, first=time.perf_counter() - BEGAN, loss=loss)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "steps":
            answer(steps=[run(int(numbers[0]) + i) for i in range(int(numbers[1]))])
        elif word == "memory":
            index = int(numbers[0])
            answer(live=_peak_live_bytes(partial(run, index), workload.device), rss=_peak_rss())
        else:
            break
    os._exit(0)  # process groups of several libraries are still up, and nothing is left to save


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_live_bytes(step: Any, device: str) -> int:
    """The most bytes of tensors that are alive at once within a step: those before it, and what the allocator was asked for."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    gc.collect()
    before = sum(_storages().values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = before
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def _storages() -> dict[int, int]:
    import warnings

    import torch

    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some old objects for their class warns
        for candidate in gc.get_objects():
            if (
                isinstance(candidate, torch.Tensor)
                and candidate.layout == torch.strided
                and not hasattr(candidate, "_local_tensor")
            ):
                try:
                    storage = candidate.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
                except (RuntimeError, NotImplementedError):  # a fake tensor, or one without memory
                    continue
    sizes.pop(0, None)
    return sizes


# The parent ---------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was measured of a contender. Times in seconds, memory in bytes; `problem` where it could not be measured."""

    name: str
    topology: str
    ranks: int
    problem: str = ""
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    live: int = 0
    rss: int = 0
    imported: float = 0.0
    first_step: float = 0.0
    deviation: float | None = None


class Running:
    """The processes of one contender."""

    def __init__(self, name: str, ranks: int, work: dict[str, Any], threads: int, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--serve", name, "--work", json.dumps(work)]
        self.log = log
        self.processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads),
                # Empty at first: what the first row of ours captures, its later rows and other topologies read.
                "SHARDCOMP_CAPTURES": str(log.parent / "captures"),
                # What DeepSpeed has torch build: a build that was killed would leave its lock for the next run.
                "TORCH_EXTENSIONS_DIR": str(log.parent / "extensions"),
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            self.processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"), text=True
                )
            )

    def ask(self, line: str = "") -> list[dict[str, Any]]:
        """Send a line to every rank, and wait for their answers. Raises RuntimeError with the end of the log if one is gone."""
        answers = []
        if line:
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(line + "\n")
                process.stdin.flush()
        for process in self.processes:
            assert process.stdout is not None
            text = _line_within(process.stdout, PATIENCE)
            if not text:
                self.end()
                lines = [row for row in self.log.read_text().splitlines() if row.strip()]
                raise RuntimeError(next((row for row in reversed(lines) if "Error" in row), lines[-1] if lines else "it ended"))
            answers.append(json.loads(text))
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _line_within(stream: Any, seconds: float) -> str:
    import select

    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else ""


def measure(rows: list[Row], work: dict[str, Any], rounds: int, steps: int, threads: int, logs: Path, say: Any) -> None:
    """Measure the contenders of one topology in turns, and fill in their rows."""
    running: dict[str, Running] = {}
    for row in rows:
        say(f"{row.topology}: setting up {row.name}")
        each_rank = max(1, threads // row.ranks)
        contender = Running(row.name, row.ranks, work, each_rank, logs / f"{row.name.replace(' ', '_').replace('/', '_')}.log")
        try:
            answers = contender.ask()
            if "absent" in answers[0]:
                row.problem = answers[0]["absent"]
                contender.end()
                continue
            row.imported = max(answer["imported"] for answer in answers)
            row.first_step = max(answer["first"] for answer in answers)
            row.losses.append(statistics.mean(answer["loss"] for answer in answers))
            running[row.name] = contender
        except RuntimeError as error:
            row.problem = str(error)[:200]
    taken = 1
    for turn in range(rounds):
        say(f"{rows[0].topology}: round {turn + 1} of {rounds}")
        for row in rows:
            if row.name in running:
                _turn(row, running, f"steps {taken} {steps}")
        taken += steps
    for row in rows:
        if row.name in running:
            _turn(row, running, f"memory {taken}")
    for contender in running.values():
        contender.end()


def _turn(row: Row, running: dict[str, Running], line: str) -> None:
    try:
        answers = running[row.name].ask(line)
    except RuntimeError as error:
        row.problem = str(error)[:200]
        del running[row.name]
        return
    if line.startswith("memory"):
        row.live, row.rss = (max(answer[key] for answer in answers) for key in ("live", "rss"))
        return
    for ranks in zip(*(answer["steps"] for answer in answers), strict=True):
        row.steps.append(max(wall for wall, _, _ in ranks))
        row.cpu.append(sum(cpu for _, cpu, _ in ranks))
        row.losses.append(statistics.mean(loss for _, _, loss in ranks))


def deviations(rows: list[Row], curve: list[float]) -> None:
    """How far each contender's losses are from the curve, relative, at the worst step."""
    for row in rows:
        pairs = list(zip(row.losses, curve, strict=False))
        if pairs and not row.problem:
            row.deviation = max(abs(loss - reference) / abs(reference) for loss, reference in pairs)


def table(rows: list[Row], tokens: int) -> str:
    """The rows of one topology as Markdown."""
    columns = ("contender", "tokens/s (quartiles)", "s a step", "CPU s", "live MB", "RSS MB")
    columns += ("imports, s", "to first step, s", "off the fp32 curve")
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.name} | {row.problem} | | | | | | | |")
            continue
        low, middle, high = _quartiles(row.steps)
        lines.append(
            f"| {row.name} | {tokens / middle:,.0f} ({tokens / high:,.0f}–{tokens / low:,.0f}) | {middle:.3f} "
            f"| {statistics.median(row.cpu):.2f} | {row.live / 1e6:,.0f} | {row.rss / 1e6:,.0f} "
            f"| {row.imported:.1f} | {row.first_step:.1f} "
            f"| {row.deviation:.1e} |"
        )
    return "\n".join(lines)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def chart(rows: list[Row], tokens: int) -> str:
    """Tokens a second as bars, in text."""
    known = [row for row in rows if not row.problem]
    fastest = max((tokens / statistics.median(row.steps) for row in known), default=1.0)
    lines = []
    for row in sorted(known, key=lambda row: statistics.median(row.steps)):
        rate = tokens / statistics.median(row.steps)
        lines.append(f"{row.name:>32} {'█' * max(1, round(40 * rate / fastest))} {rate:,.0f}")
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: under 5 minutes on two cores")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="topologies or contenders whose name contains one of these")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="(default bf16)")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1], metavar="N", help="of a step (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    for name, default, what in (
        ("hidden", 512, "features of the residual stream"),
        ("layers", 8, "decoder layers"),
        ("heads", 8, "attention heads; half as many key-value heads"),
        ("vocab", 32000, "words"),
        ("seq", 512, "tokens of a sequence"),
        ("sequences", 4, "of a step, over all ranks"),
        ("rounds", 5, "turns of each contender"),
        ("steps", 2, "steps of a turn"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together (default: cores)"
    )
    parser.add_argument("--out", type=Path, help="folder for table and JSON (default: benchmarks/results)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    quick, _ = parser.parse_known_args(arguments)
    if quick.quick:
        parser.set_defaults(**QUICK)  # what is given beside it still counts
    args = parser.parse_args(arguments)
    if args.sequences % (2 * max(args.micro_batches)):
        parser.error(f"--sequences {args.sequences}: use a multiple of {2 * max(args.micro_batches)}, 2 ranks × micro-batches")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.serve:
        serve(args.serve, args.work)
        return 0
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tempfile

    from contenders import CONTENDERS, Workload

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", file=sys.stderr, flush=True)

    chosen = [
        row
        for row in CONTENDERS
        if not args.only or any(text.lower() in f"{row.topology}: {row.name}".lower() for text in args.only)
    ]
    if not chosen:
        names = ", ".join(dict.fromkeys(f"{row.topology}: {row.name}" for row in CONTENDERS))
        print(f"--only {' '.join(args.only)}: no contender is named so; there are {names}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": machine(args.device), "command": " ".join(sys.argv), "runs": []}
    text = [f"Command: `python {' '.join(sys.argv)}`", "", f"Machine: `{json.dumps(results['machine'])}`", ""]
    with tempfile.TemporaryDirectory() as logs:
        for precision in args.precision:
            for micro_batches in args.micro_batches:
                sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "vocab", "seq", "sequences")}
                work = Workload(**sizes, micro_batches=micro_batches, precision=precision, device=args.device)
                reference = Row("HuggingFace eager", "float32 curve", 1)
                float32 = asdict(replace(work, precision="fp32", micro_batches=1))
                measure([reference], float32, 1, min(args.rounds * args.steps, 6), args.threads, Path(logs), say)
                for topology in dict.fromkeys(row.topology for row in chosen):
                    rows = [Row(row.name, row.topology, row.ranks) for row in chosen if row.topology == topology]
                    measure(rows, asdict(work), args.rounds, args.steps, args.threads, Path(logs), say)
                    deviations(rows, reference.losses)
                    title = f"## {topology}, {precision}, {micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"
                    section = [
                        title,
                        "",
                        table(rows, args.sequences * args.seq),
                        "",
                        "```",
                        chart(rows, args.sequences * args.seq),
                        "```",
                        "",
                    ]
                    print("\n".join(section), flush=True)
                    text += section
                    results["runs"].append(
                        {"workload": asdict(work), "topology": topology, "rows": [asdict(row) for row in rows]}
                    )
    folder = args.out or ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{results['machine']['date']}-compare-{args.device}{'-quick' if args.quick else ''}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(text))
    say(f"written: {stem}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
