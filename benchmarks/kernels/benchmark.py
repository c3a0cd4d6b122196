"""Time every fused operator beside other implementations of it: forward and backward, in one run.

    python benchmarks/kernels/benchmark.py [--device cpu] [--dtype bf16] [--shapes 7b 65b llama3] [--operators rms_norm ...]
                                         [--rows 2048] [--json FILE] [--chart FILE] [--seconds 0.5]

A row is one implementation of an operator at one shape. It has:

    ms         the median time of a call
    ±          the distance between the quartiles of its times
    of copy    its share of a plain copy's bandwidth, which is measured in the same run. The operator's bytes are the fewest
               possible: each operand and result once, in its dtype. An operator that multiplies matrices has no such share.
    peak MB    the most memory that one forward and one backward take at a time. Results and gradients count, operands do not.

On a GPU, events on the device take the time. The device waits until the host has launched the whole call, so the time has no
launching in it. The cache of the GPU is overwritten before each call.

An implementation that is not installed, or does not run here, is listed with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import shardcomp
from shardcomp import kernels
from shardcomp.inspect.environment import versions
from shardcomp.kernels import library

EPS = 1e-5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    hidden, inner: features of a layer and of its MLP. heads, key_heads: heads of queries and of keys. head: features of a head.
    words: size of the vocabulary.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    words: int


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 128, 32000),
    "65b": Shape(8192, 22016, 64, 64, 128, 32000),
    "llama3": Shape(4096, 14336, 32, 8, 128, 128256),
}

Operands = list[Tensor]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    make: returns new operands. least: the fewest bytes that forward and backward move, or None if the operator multiplies
    matrices. calls: name of an implementation -> its function, or the reason why it does not run.
    """

    operator: str
    shape: str
    make: Callable[[], Operands]
    least: tuple[int, int] | None
    calls: dict[str, Call | str]
    backward: bool = True


@dataclass
class Row:
    """The measurements of one implementation.

    forward, backward: medians in seconds. *_spread: the distance between the quartiles. *_share: the share of a copy's
    bandwidth. peak: bytes. failed: why there are no measurements. The docstring of this module defines them.
    """

    operator: str
    shape: str
    dtype: str
    implementation: str
    forward: float | None = None
    forward_spread: float | None = None
    forward_share: float | None = None
    backward: float | None = None
    backward_spread: float | None = None
    backward_share: float | None = None
    peak: int | None = None
    failed: str = ""


@dataclass
class Setting:
    """The conditions of a measurement.

    rows: tokens. seconds: how long each call is repeated.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    seconds: float
    threads: int = field(default_factory=torch.get_num_threads)


def random_tensor(setting: Setting, *shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape, device=setting.device, dtype=setting.dtype).requires_grad_(requires_grad)


def hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = LlamaRMSNorm(x.shape[-1], EPS)
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return norm(x)


def norm_after_add(norm: Call, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight), total


def hf_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight).float(), labels)


def hf_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels)


def hf_gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def f_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, EPS)


def liger(name: str, device: torch.device) -> Call | str:
    """An operator of Liger-Kernel, or the reason why it cannot run here."""
    if device.type == "cpu":
        return "Liger-Kernel needs a GPU"
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        return f"Liger-Kernel is not installed ({error})"
    calls: dict[str, Call] = {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS),
        "rotary": lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin),
        "swiglu": LigerSiLUMulFunction.apply,
        "cross_entropy": lambda logits, labels: LigerCrossEntropyFunction.apply(logits, labels, None)[0],
        "linear_cross_entropy": lambda x, w, labels: LigerFusedLinearCrossEntropyFunction.apply(x, w, labels)[0],
    }
    if name == "add_rms_norm":
        try:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        except ImportError as error:
            return f"this release of Liger-Kernel has no add_rms_norm ({error})"
        return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)
    return calls.get(name, "Liger-Kernel has no such operator")


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def cases(name: str, setting: Setting, operators: set[str], shape: Shape | None = None) -> Iterator[Case]:
    """Yield the cases of some operators at one shape.

    name: a key of SHAPES, or the name of `shape` if that is given.
    """
    shape, device, rows = shape or SHAPES[name], setting.device, setting.rows
    size = torch.empty((), dtype=setting.dtype).itemsize
    h, f, v, d = shape.hidden, shape.inner, shape.words, shape.head
    make = partial(random_tensor, setting)

    def labels() -> Tensor:
        return torch.randint(0, v, (rows,), device=device)

    def case(operator: str, operands: Callable[[], Operands], least: tuple[int, int] | None, ours: Call, **others: Any) -> Case:
        calls: dict[str, Call | str] = {"shardcomp": ours, "HuggingFace": others.pop("HuggingFace")}
        calls["torch.compile"] = compiled(calls["HuggingFace"])  # type: ignore[arg-type]
        calls |= {key.replace("_", " "): call for key, call in others.items()}
        return Case(operator, name, operands, least, {**calls, "Liger": liger(operator, device)})

    if "rms_norm" in operators:
        yield case(
            "rms_norm", lambda: [make(rows, h), make(h)], (2 * rows * h * size, 3 * rows * h * size),
            lambda x, w: kernels.rms_norm(x, w, eps=EPS, round_first=True),
            HuggingFace=hf_norm, F_rms_norm=f_norm,
        )  # fmt: skip
    if "add_rms_norm" in operators:
        yield case(
            "add_rms_norm", lambda: [make(rows, h), make(rows, h), make(h)], (4 * rows * h * size, 4 * rows * h * size),
            lambda x, r, w: kernels.add_rms_norm(x, r, w, eps=EPS, round_first=True),
            HuggingFace=partial(norm_after_add, hf_norm), F_rms_norm=partial(norm_after_add, f_norm),
        )  # fmt: skip
    if "layer_norm" in operators:
        yield case(
            "layer_norm", lambda: [make(rows, h), make(h), make(h)], (2 * rows * h * size, 3 * rows * h * size),
            lambda x, w, b: kernels.layer_norm(x, w, b, eps=EPS),
            HuggingFace=lambda x, w, b: functional.layer_norm(x, (h,), w, b, EPS),
        )  # fmt: skip
    if "rotary" in operators:
        nbytes = rows * d * (shape.heads + shape.key_heads) * size  # cos and sin, which all heads share, are not counted

        def rotary_operands() -> Operands:
            q, k = (make(1, rows, n, d).transpose(1, 2) for n in (shape.heads, shape.key_heads))
            angles = torch.rand(1, rows, d // 2, device=device).mul_(6.28).repeat(1, 1, 2)
            return [q, k, angles.cos().to(setting.dtype), angles.sin().to(setting.dtype)]

        yield case(
            "rotary", rotary_operands, (2 * nbytes, 2 * nbytes),
            lambda q, k, cos, sin: kernels.rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1), round_each=True),
            HuggingFace=apply_rotary_pos_emb,
        )  # fmt: skip
    if "swiglu" in operators:
        yield case(
            "swiglu", lambda: [make(rows, f), make(rows, f)], (3 * rows * f * size, 5 * rows * f * size),
            partial(kernels.swiglu, round_first=True), HuggingFace=hf_gate,
        )  # fmt: skip
    if "cross_entropy" in operators:
        yield case(
            "cross_entropy", lambda: [make(rows, v), labels()], (rows * v * size, 2 * rows * v * size),
            lambda logits, labels: kernels.cross_entropy(logits, labels, -100).sum() / labels.numel(), HuggingFace=hf_loss,
            F_cross_entropy=functional.cross_entropy,
        )  # fmt: skip
    if "linear_cross_entropy" in operators:
        chunks = math.ceil(v / (2 * h))
        yield case(
            "linear_cross_entropy",
            lambda: [make(rows, h), (make(v, h, requires_grad=False) / h**0.5).requires_grad_(), labels()],
            None,
            lambda x, w, labels: kernels.linear_cross_entropy(
                x, w, labels, labels.numel(), ignore_index=-100, chunks=chunks, early=setting.dtype != torch.float16
            ),
            HuggingFace=hf_head,
            F_linear_cross_entropy=getattr(functional, "linear_cross_entropy", f"torch {torch.__version__} has none"),
        )  # fmt: skip
    if "adamw" in operators:
        yield adamw(name, setting, 4 * h * h)


def adamw(name: str, setting: Setting, numbers: int) -> Case:
    """One optimizer step on the attention weights of a layer: `numbers` float32 numbers, whatever the setting's dtype is."""

    def step(optimizer_class: Any, **options: Any) -> Call:
        weights = [nn.Parameter(torch.randn(numbers // 4, device=setting.device)) for _ in range(4)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = optimizer_class(weights, lr=1e-4, weight_decay=0.1, **options)
        return lambda: optimizer.step()

    calls: dict[str, Call | str] = {
        "shardcomp": step(shardcomp.AdamW),
        "torch foreach": step(torch.optim.AdamW, foreach=True),
        "torch fused": step(torch.optim.AdamW, fused=True),
    }
    # Seven float32 numbers each: weight, gradient and two moments are read, weight and moments are written.
    return Case("adamw", name, list, (28 * numbers, 0), calls, backward=False)


def operand_sets(case: Case, setting: Setting) -> list[Operands]:
    """Several sets of operands to call in turn. On a GPU they exceed the cache, so that no call finds its operands there.

    On the CPU one set is enough: it is larger than the cache.
    """
    first = case.make()
    if setting.device.type == "cpu" or not first:
        return [first]
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    copies = min(8, math.ceil(3 * cache / sum(t.nbytes for t in first)))
    return [first, *(case.make() for _ in range(copies - 1))]


LEAST, MOST, AT_ONCE = 10, 200, 5
"""How often a call on a GPU is timed, at least and at most, and how many calls are launched between two synchronizations."""


def timed_on_gpu(call: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """As `timed`, with events on the device."""
    # A sum over a large tensor evicts the operands from the cache. It only reads, so no dirty lines remain whose write-back the
    # timed call would have to wait for.
    size = max(4 * torch.cuda.get_device_properties(setting.device).L2_cache_size, 2**28)
    evicting, total = torch.ones(size // 4, device=setting.device), torch.empty((), device=setting.device)
    for _ in range(2):
        torch.cuda.synchronize(setting.device)
        began = time.perf_counter()
        call()
        launching = time.perf_counter() - began
    # `_sleep` takes cycles, and no GPU here has more than 2e9 a second. The device sleeps longer than the host needs to launch.
    wait = int((3 * launching + 1e-4) * 2e9)
    times: list[float] = []
    end = time.perf_counter() + setting.seconds
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() < end):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(AT_ONCE)]
        for first, last in events:
            torch.sum(evicting, dim=0, out=total)
            torch.cuda._sleep(wait)
            first.record()
            call()
            last.record()
        torch.cuda.synchronize(setting.device)
        times += [first.elapsed_time(last) / 1e3 for first, last in events]
    low, median, high = statistics.quantiles(times, n=4)
    return median, high - low


def timed(call: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """The median time of a call in seconds, and the distance between its quartiles."""
    if setting.device.type == "cuda":
        return timed_on_gpu(call, setting)
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=setting.threads)
    times = timer.blocked_autorange(min_run_time=setting.seconds)
    return times.median, times.iqr


def results(output: Any) -> list[Tensor]:
    """The tensors of an output that have a gradient."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return [tensor for tensor in outputs if isinstance(tensor, Tensor) and tensor.requires_grad]


def output_gradient(output: Tensor) -> Tensor:
    """The gradient to start a backward with: 1 for a loss, random numbers for any other result."""
    return torch.randn_like(output) if output.dim() else torch.ones_like(output)


def measure(case: Case, name: str, call: Call, setting: Setting, bandwidth: float) -> Row:
    """Measure one implementation of a case. An exception of the implementation becomes the row's `failed`."""
    row = Row(case.operator, case.shape, str(setting.dtype).removeprefix("torch."), name)
    sets = operand_sets(case, setting)
    try:
        next_operands = itertools.cycle(sets)
        row.forward, row.forward_spread = timed(lambda: call(*next(next_operands)), setting)
        if case.backward:
            graphs = []
            for operands in sets:
                outputs = results(call(*operands))
                inputs = [operand for operand in operands if operand.requires_grad]
                graphs.append((outputs, inputs, [output_gradient(output) for output in outputs]))
            next_graph = itertools.cycle(graphs)
            row.backward, row.backward_spread = timed(
                lambda: torch.autograd.grad(*next(next_graph), retain_graph=True), setting
            )
            del graphs, outputs, next_graph  # `peak` must not see what these graphs keep alive
            row.peak = peak(call, sets[0], setting.device)
        if case.least is not None:
            row.forward_share = case.least[0] / row.forward / bandwidth
            row.backward_share = case.least[1] / row.backward / bandwidth if row.backward else None
    except Exception as error:
        row.failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return row


def peak(call: Call, operands: Operands, device: torch.device) -> int:
    """The most bytes that one forward and one backward take at a time. Results and gradients count, operands do not."""
    inputs = [operand for operand in operands if operand.requires_grad]

    def run() -> None:
        outputs = results(call(*operands))
        torch.autograd.grad(outputs, inputs, [output_gradient(output) for output in outputs])

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    # One event per allocation, in the order of time. Its bytes are negative where memory is freed.
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def rows(
    all_cases: list[Case], setting: Setting, bandwidth: float, show: Callable[[str], None] = lambda text: None
) -> Iterator[Row]:
    """Measure all implementations of all cases, one after the other. `show` is called with the name of the next one."""
    dtype = str(setting.dtype).removeprefix("torch.")
    for case in all_cases:
        for name, call in case.calls.items():
            show(f"{case.operator} {case.shape} {name}")
            if isinstance(call, str):
                yield Row(case.operator, case.shape, dtype, name, failed=call)
            else:
                yield measure(case, name, call, setting, bandwidth)


def copied(setting: Setting) -> float:
    """The bandwidth of a copy of a large tensor, in bytes per second. Bytes that are read and bytes that are written count."""
    size = 2**28 if setting.device.type == "cpu" else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), setting)[0]


OPERATORS = ("rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu", "cross_entropy", "linear_cross_entropy", "adamw")


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table. Those that failed are left out."""
    result = Table(title=title, title_justify="left")
    result.add_column("operator")
    result.add_column("shape")
    result.add_column("implementation")
    for column in ("forward ms", "±", "of copy", "backward ms", "±", "of copy", "peak MB"):
        result.add_column(column, justify="right")
    previous = None
    for row in (row for row in rows if not row.failed):
        if previous not in (None, (row.operator, row.shape)):
            result.add_section()
        previous = row.operator, row.shape
        numbers = [
            _number(row.forward, 1e3, 3), _number(row.forward_spread, 1e3, 3), _number(row.forward_share, 100, 0, "%"),
            _number(row.backward, 1e3, 3), _number(row.backward_spread, 1e3, 3), _number(row.backward_share, 100, 0, "%"),
            _number(row.peak, 1e-6, 0),
        ]  # fmt: skip
        result.add_row(row.operator, row.shape, row.implementation, *numbers)
    return result


def _number(value: float | None, times: float, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value * times:.{digits}f}{unit}"


def chart(rows: list[Row], path: str, title: str) -> None:
    """Draw the times as bars: forward and backward of every implementation, with a panel for each operator and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.failed:
            groups.setdefault((row.operator, row.shape), []).append(row)
    columns = min(4, len(groups))
    figure, axes = pyplot.subplots(
        math.ceil(len(groups) / columns),
        columns,
        figsize=(4.2 * columns, 2.6 * math.ceil(len(groups) / columns)),
        squeeze=False,
    )
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for panel, ((operator, shape), members) in zip(axes.flat, groups.items(), strict=False):
        names = [row.implementation for row in members]
        forward = [(row.forward or 0) * 1e3 for row in members]
        panel.barh(names, forward, label="forward")
        panel.barh(names, [(row.backward or 0) * 1e3 for row in members], left=forward, label="backward")
        panel.invert_yaxis()
        panel.set_title(f"{operator}, {shape}", fontsize=9)
        panel.set_xlabel("ms", fontsize=8)
        panel.tick_params(labelsize=8)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def conditions(setting: Setting, bandwidth: float) -> dict[str, Any]:
    """The machine, the versions and the setting of a measurement, for its file of results."""
    name = (
        torch.cuda.get_device_name(setting.device)
        if setting.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "date": f"{datetime.now():%Y-%m-%d}", "device": name, "threads": setting.threads, "rows": setting.rows,
        "dtype": str(setting.dtype).removeprefix("torch."), "copy_bytes_per_second": bandwidth, "seconds": setting.seconds,
        "kernels": library.load().kind, "versions": versions(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b"])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--rows", type=int, default=2048, help="tokens (default 2048)")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each call is repeated (default 0.5)")
    parser.add_argument("--json", metavar="FILE", help="write the rows, the machine and the versions as JSON")
    parser.add_argument("--chart", metavar="FILE", help="draw the times as a PNG (needs matplotlib)")
    args = parser.parse_args()
    if args.chart and importlib.util.find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib: pip install matplotlib")
    console, results_by_dtype = Console(), []
    if not console.is_terminal:
        console = Console(width=140)
    for dtype in args.dtype:
        setting = Setting(torch.device(args.device), DTYPES[dtype], args.rows, args.seconds)
        bandwidth = copied(setting)
        all_cases = [case for name in args.shapes for case in cases(name, setting, set(args.operators))]
        measured = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=sum(len(case.calls) for case in all_cases))
            for row in rows(all_cases, setting, bandwidth, lambda text: progress.update(task, description=text)):  # noqa: B023
                measured.append(row)
                progress.advance(task)
        about = conditions(setting, bandwidth)
        machine = f"{about['device']}, {about['threads']} threads, {dtype}, {args.rows} rows"
        title = f"{machine}, a copy moves {bandwidth / 1e9:.0f} GB/s, kernels: {about['kernels']}"
        console.print(table(measured, title))
        for row in (row for row in measured if row.failed):
            console.print(f"{row.operator}, {row.shape}, {row.implementation}: {row.failed}", highlight=False)
        results_by_dtype.append({**about, "rows_measured": [asdict(row) for row in measured]})
        if args.chart:
            stem, dot, suffix = args.chart.rpartition(".")
            chart(measured, args.chart if len(args.dtype) == 1 else f"{stem}-{dtype}{dot}{suffix}", title)
    if args.json:
        Path(args.json).write_text(json.dumps(results_by_dtype, indent=1) + "\n")


if __name__ == "__main__":
    main()
