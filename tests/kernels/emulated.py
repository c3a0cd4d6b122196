"""CUDA's kernels on the host: `build` compiles csrc/cuda for the emulated device, and each check of this file is run in a
process of its own under AddressSanitizer.

`python -m kernels.emulated <library> <check> <seed>`: the seed is that of the first schedule of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardcomp.kernels import library
from shardcomp.kernels.build import SOURCES, TORCH_TARGET, recipe

ROOT = Path(__file__).parents[2]
SPACE = "shardcomp_emulated"
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address")
_HERE = (
    "-DSHARDCOMP_EMULATED",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
)


@dataclass(frozen=True)
class Fault:
    """A change of a file of csrc, with which one source is compiled."""

    file: str
    old: str
    new: str
    source: str


def sanitizer() -> Path | None:
    """The library of AddressSanitizer that belongs to the compiler."""
    said = subprocess.run([recipe([]).compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = Path(said.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def build(fault: Fault | None = None) -> Path:
    """The library of the emulated kernels, in a folder of this machine where it is found again."""
    home = Path(tempfile.gettempdir()) / f"shardcomp-emulated-{os.getuid()}"
    home.mkdir(exist_ok=True)
    digest = hashlib.sha256(repr((_FLAGS, _HERE)).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    key = digest.hexdigest()[:16]
    with library._alone(home / f"{key}.lock"), ThreadPoolExecutor(2) as pool:
        sources = [
            *sorted((SOURCES / "cuda").glob("*.cu")),
            SOURCES / "emulation" / "device.cpp",
            SOURCES / "binding" / "cuda.cpp",
        ]
        objects = dict(zip(sources, pool.map(lambda source: _compiled(home / key, source), sources), strict=True))
    if fault is None:
        return _linked(home / key / "kernels.so", list(objects.values()))
    place = home / f"{key}-{hashlib.sha256(repr(fault).encode()).hexdigest()[:16]}"
    with library._alone(place.with_suffix(".lock")):
        if not place.exists():
            subprocess.run(["cp", "-rL", str(SOURCES), str(place)], check=True)
            text = (place / fault.file).read_text()
            assert fault.old in text, f"{fault.file} has no {fault.old!r}"
            (place / fault.file).write_text(text.replace(fault.old, fault.new))
        objects[SOURCES / fault.source] = _compiled(place, place / fault.source)
        return _linked(place / "kernels.so", list(objects.values()))


def _compiled(place: Path, source: Path) -> Path:
    output = place / f"{source.parent.name}_{source.stem}.o"
    if not output.exists():
        place.mkdir(exist_ok=True)
        headers = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(Path(torch.__file__).parent / "include"))
        command = [recipe([]).compiler, *_FLAGS, *_HERE, *headers, "-x", "c++", "-c", str(source), "-o", f"{output}.new"]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        os.replace(f"{output}.new", output)
    return output


def _linked(output: Path, objects: list[Path]) -> Path:
    if not output.exists():
        torch_libraries = Path(torch.__file__).parent / "lib"
        command = [recipe([]).compiler, "-shared", "-fsanitize=address", "-o", f"{output}.{os.getpid()}", *map(str, objects)]
        subprocess.run([*command, f"-L{torch_libraries}", "-ltorch_cpu"], check=True)
        os.replace(f"{output}.{os.getpid()}", output)
    return output


def environment() -> dict[str, str]:
    """That of a process that loads an emulated library."""
    return os.environ | {
        "LD_PRELOAD": f"{sanitizer()} libstdc++.so.6",  # or what is thrown ends the process
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "SHARDCOMP_KERNELS": "reference",
        "OMP_NUM_THREADS": "1",
    }


def run(library_path: Path, check: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a check of a library in a process of its own."""
    command = [sys.executable, "-m", "kernels.emulated", str(library_path), check, str(seed)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=600)


_DEVICE: list[ctypes.CDLL] = []
"""The library, once it is loaded."""

CHECKS: dict[str, Callable[[Callable[[], int]], None]] = {}
"""Name -> a check. It is given what takes the next schedule, and says its number."""


def _check(function: Callable[[Callable[[], int]], None]) -> Callable[[Callable[[], int]], None]:
    CHECKS[function.__name__] = function
    return function


def _main(path: str, name: str, seed: str) -> None:
    from kernels import test_library

    from shardcomp.kernels.register import REFERENCES

    held = torch.library.Library(SPACE, "FRAGMENT")
    for each in REFERENCES:
        held.define(str(getattr(torch.ops.shardcomp, each).default._schema).removeprefix("shardcomp::"))
    torch.ops.load_library(path)
    test_library.SPACE = SPACE
    _DEVICE.append(ctypes.CDLL(path))
    take = _DEVICE[0].shardcomp_seed
    take.argtypes = [ctypes.c_uint64]
    state = int(seed)

    def another() -> int:
        nonlocal state
        take(state)
        state += 1
        return state - 1

    CHECKS[name](another)
    print(f"{name}: {state - int(seed)} schedules")


@_check
def values(another: Callable[[], int]) -> None:
    """Sizes from one element of a row to several warps of them, and more than shared memory holds; each in another schedule."""
    from kernels.test_library import DTYPES, agree, calls, results

    for dtype in DTYPES:
        for h in (0, 1, 3, 8, 31, 127, 260):
            another()
            every = calls(dtype, h)
            for name, arguments in every.items():
                if name.startswith("layer_norm ") and name.endswith("False"):
                    # The same values in either case but for a rounding; torch's own operator is further off for few elements.
                    both = [results(each, every[each]) for each in (name, f"{name[:-5]}True")]
                    eps = torch.finfo(dtype).eps
                    torch.testing.assert_close(*both, rtol=2 * eps, atol=1e-6 if eps > 1e-8 else 1e-15, equal_nan=True)
                else:
                    agree(name, arguments)
        for h, rows in ((1027, (5,)), (1152, (7,)), (8200, (2,))) if dtype != torch.float16 else ():
            another()
            for name, arguments in calls(dtype, h, rows).items():
                if not name.startswith(("adamw_", "grad_norm", "gated")):
                    agree(name, arguments)


def _aligned(x: Tensor) -> Tensor:
    """Rows of 21 elements, 32 elements apart."""
    if x.dim() < 2 or x.shape[-1] != 21 or not x.numel():
        return x
    count = x.numel() // 21
    rows = x.new_empty(32 * count - 11).as_strided((count, 21), (32, 1))
    return rows.copy_(x.reshape(count, 21)).unflatten(0, x.shape[:-1])


@_check
def layouts(another: Callable[[], int]) -> None:
    """Rows and strides of all kinds, other dtypes of weights and tables, rows that lie far apart, rows that may be moved 16
    bytes at a time but for their ends, behind the last of which nothing may be touched."""
    from kernels import test_library as tests

    for rows in ((), (0,), (0, 3), (1,), (70, 3), (2, 3, 2, 5)):
        another()
        tests.test_any_number_of_rows_may_be_given(rows)
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for layout in tests.LAYOUTS:
        another()
        tests.test_values_do_not_depend_on_strides(half, layout)
    for dtype, other in ((half, single), (single, half), (torch.float16, half), (double, half), (half, double)):
        another()
        tests.test_weights_and_tables_may_have_another_dtype(dtype, other)
    for dtype in tests.DTYPES:
        another()
        for name, arguments in tests.calls(dtype, 21).items():
            tests.agree(name, tuple(tests.changed(_aligned, each) for each in arguments))
    tests.test_queries_and_keys_are_turned_as_they_lie()
    for dtype in tests.DTYPES:
        tests.test_gate_and_up_may_be_halves_of_one_tensor_or_lie_alone(dtype)
        for turned in (16, 32, 48, 20):
            tests.test_any_number_of_heads_may_share_their_tables(dtype, turned)
    tests.test_what_lies_between_rows_is_not_written()
    tests.test_rows_may_lie_more_than_two_to_the_31_elements_apart()


@_check
def extremes(another: Callable[[], int]) -> None:
    """What is not finite, every narrow number, long rows and many tensors."""
    from kernels import test_library as tests

    for dtype in tests.DTYPES:
        another()
        tests.test_what_is_not_finite_is_so_where_it_is_in_the_reference(dtype)
        tests.test_many_tensors_are_gone_through_as_one(dtype)
        for columns in (1027, 70001):
            another()
            tests.test_a_vocabulary_may_be_read_in_pieces(dtype, columns)
    for dtype in (torch.bfloat16, torch.float16):
        tests.test_narrow_numbers_are_rounded_as_torch_rounds_them(dtype)
    gates = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    actual = getattr(torch.ops, SPACE).gated(gates, torch.ones_like(gates), "silu", True)
    different = (actual != torch.nn.functional.silu(gates)) & ~gates.isnan() & (gates != -torch.inf)
    assert int(different.sum()) <= 4, gates[different]
    assert bool(actual[gates.isnan() | (gates == -torch.inf)].isnan().all())
    tests.test_logits_that_are_not_finite_give_what_the_reference_gives()
    tests.test_a_norm_that_float32_cannot_hold_is_infinite()
    another()
    for name, arguments in tests.calls_of_lists(torch.bfloat16, [(i % 7, 3) for i in range(300)], torch.float16).items():
        tests.agree(name, arguments)


@_check
def exact(another: Callable[[], int]) -> None:
    """Against float64: no result is further from it than its own rounding and those that its operator is asked for."""
    from kernels.test_library import calls, changed, results

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for h, rows in ((64, (3, 5)), (33, (3, 5)), (1032, (9,))):
            another()
            for name, arguments in calls(dtype, h, rows).items():
                if name.startswith("adamw_"):
                    continue
                actual = results(name, arguments)
                wide = tuple(changed(lambda x: x.double() if x.is_floating_point() else x, each) for each in arguments)
                for a, b in zip(actual, results(name, wide, reference=True), strict=True):
                    # What is normalised was rounded, if it is a sum.
                    eps = max(torch.finfo(each).eps for each in (a.dtype, dtype if name.startswith("add") else torch.float32))
                    largest = float(b.abs().amax()) if b.numel() else 0
                    error = (a.double() - b).abs() - 3 * eps * b.abs()
                    # Sums that cancel, of products that were rounded.
                    assert not a.numel() or float(error.amax()) <= 4 * eps * largest, (
                        name,
                        dtype,
                        h,
                        float(error.amax()),
                        largest,
                    )


@_check
def bits(another: Callable[[], int]) -> None:
    """Where all but a sum is done in the order of the reference, its bits are met but for the last one of that sum."""
    from kernels.test_library import calls, results

    found: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    same = ("rotary", "add_rms_norm", "rms_norm", "gated silu", "gated gelu_tanh", "layer_norm")
    for dtype in (torch.bfloat16, torch.float16):
        for h, rows in ((64, (40, 8)), (1032, (12,))):
            another()
            for name, arguments in calls(dtype, h, rows).items():
                # What is not stepwise has the bits of torch's own operator, another one on each device.
                if not name.startswith(same) or "_bwd" in name or (name.startswith("layer_norm") and name.endswith("False")):
                    continue
                actual, expected = results(name, arguments)[0], results(name, arguments, reference=True)[0]
                found.setdefault((dtype, name), []).append((actual != expected).flatten())
                # Where a bias cancels a value, the last bits of float32 are left.
                torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                assert not name.startswith("add") or torch.equal(results(name, arguments)[1], arguments[0] + arguments[1])
    for (dtype, name), each in found.items():
        unlike = float(torch.cat(each).float().mean())
        # The chance that a last bit of float32 decides how a number is rounded is eight times as large in float16.
        most = 1e-4 * torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps
        assert unlike <= (0 if name.startswith("rotary") else most), (name, dtype, unlike)


@_check
def schedules(another: Callable[[], int]) -> None:
    """In whatever order threads go on, the bits are the same: 24 orders of every kernel with a barrier."""
    from kernels.test_library import agree, calls, results

    kinds = ("rms_norm weighted 1.0 True", "rms_norm_bwd False False", "layer_norm False False", "layer_norm_bwd False False")
    kinds += ("cross_entropy_statistics", "grad_norm")
    for h, rows, dtype in ((1153, (7,), torch.bfloat16), (40, (19,), torch.float64)):
        some = {name: arguments for name, arguments in calls(dtype, h, rows).items() if name.startswith(kinds)}
        first: dict[str, list[torch.Tensor]] = {}
        for _ in range(24):
            another()
            for name, arguments in some.items():
                if name not in first:
                    agree(name, arguments)
                actual = results(name, arguments)
                assert all(torch.equal(a, b) for a, b in zip(actual, first.setdefault(name, actual), strict=True)), name


@_check
def in_registers(another: Callable[[], int]) -> None:
    """Rows that threads keep in registers: the same bits in every schedule.

    Rows of one warp and of more; with and without a last vector that only some threads have; and more rows than blocks, so that
    each block has several, the next ones in flight.
    """
    from kernels.test_library import agree, calls, results

    kinds = ("add_rms_norm weighted 0.0 True", "rms_norm weighted 1.0 False", "rms_norm_bwd False False")
    kinds += ("rms_norm_bwd True True", "layer_norm False False", "layer_norm_bwd")
    half, short, single = torch.bfloat16, torch.float16, torch.float32
    # Then multiprocessors, one so that a block has more rows than a warp has lanes; and of shared memory, in KiB, so much that
    # one, two or three rows are on their way.
    for dtype, other, h, rows, orders, multiprocessors, shared in (
        (half, single, 1032, 66, 8, 3, 40),
        (half, half, 520, 100, 2, 3, 227),
        (half, half, 4096, 37, 1, 3, 227),
        (half, half, 8192, 4, 1, 3, 227),
        (half, half, 1032, 300, 1, 1, 227),
        (short, short, 1536, 37, 1, 3, 227),
        (short, short, 16384, 4, 1, 3, 227),
        (single, single, 264, 100, 1, 3, 227),
        (single, single, 2048, 37, 4, 3, 100),
    ):
        _DEVICE[0].shardcomp_device(multiprocessors, ctypes.c_int64(shared << 10))
        some = {name: each for name, each in calls(dtype, h, (rows,), other).items() if name.startswith(kinds)}
        first: dict[str, list[Tensor]] = {}
        for _ in range(orders):
            another()
            for name, arguments in some.items():
                if name not in first:
                    agree(name, arguments)
                actual = results(name, arguments)
                assert all(torch.equal(a, b) for a, b in zip(actual, first.setdefault(name, actual), strict=True)), (
                    name,
                    dtype,
                    h,
                )


if __name__ == "__main__":
    _main(*sys.argv[1:])
