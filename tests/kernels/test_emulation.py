"""CUDA's kernels, executed on the host: their results in many orders of their threads, and that faults in them are noticed."""

from __future__ import annotations

import subprocess

import pytest
from kernels import emulated
from kernels.emulated import CHECKS, Fault

from shardcomp.kernels.build import BuildError


def _possible() -> bool:
    try:
        return emulated.sanitizer() is not None
    except BuildError:
        return False


pytestmark = pytest.mark.skipif(not _possible(), reason="there is no compiler with AddressSanitizer")


_LONG = {name: () if name == "schedules" else (pytest.mark.long,) for name in CHECKS}  # the claim that only emulation checks


@pytest.mark.parametrize("check", [pytest.param(name, marks=marks) for name, marks in _LONG.items()])
def test_kernels_give_what_references_do(check: str) -> None:
    completed = emulated.run(emulated.build(), check)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    print(completed.stdout)


_WAIT = "  __syncthreads();  // all have read: the next sum may overwrite the exchange\n"
_FAULTS = {
    "a barrier is missing": (Fault("cuda/device.h", f"{_WAIT}}}", "}", "cuda/layer_norm.cu"), "schedules", "AssertionError"),
    "sums are read before they are made": (
        Fault("cuda/norm.h", "    if (!staged) return;\n    __syncthreads();", "    if (!staged) return;", "cuda/rms_norm.cu"),
        "schedules",
        "AssertionError",
    ),
    "a sum is read before every warp has added to it": (
        Fault(
            "cuda/norm.h",
            "  __syncthreads();\n#pragma unroll\n  for (int k = 0; k < count; ++k) x[k] = slots[k];",
            "#pragma unroll\n  for (int k = 0; k < count; ++k) x[k] = slots[k];",
            "cuda/layer_norm.cu",
        ),
        "in_registers",
        "AssertionError",
    ),
    "sums of one row and the next have one place": (
        Fault("cuda/norm.h", "calls++ % 2", "calls++ % 1", "cuda/rms_norm.cu"),
        "in_registers",
        "AssertionError",
    ),
    "a row is read before it has come": (
        Fault("cuda/norm.h", "return await_groups<2>();", "return await_groups<3>();", "cuda/layer_norm.cu"),
        "in_registers",
        "AssertionError",
    ),
    "the next row is read before it has come": (
        Fault("cuda/norm.h", "return await_groups<1>();", "return await_groups<2>();", "cuda/rms_norm.cu"),
        "in_registers",
        "AssertionError",
    ),
    "a row comes where one is that is still read": (
        Fault("cuda/norm.h", "slot + 1 == depth ? 0 : slot + 1", "slot + 2 < depth ? slot + 1 : 0", "cuda/rms_norm.cu"),
        "in_registers",
        "AssertionError",
    ),
    "the numbers of a warp's rows are kept for those behind them": (
        Fault("cuda/norm.h", "    if (lane == 0 && at != 0) refill(at);\n", "", "cuda/layer_norm.cu"),
        "in_registers",
        "AssertionError",
    ),
    "a barrier that some threads do not come to": (
        Fault("cuda/summed.cu", "  if (column < a.width) {", "  if (column >= a.width) return;\n  {", "cuda/summed.cu"),
        "schedules",
        "threads wait for others that have ended",
    ),
    "a row's end is not minded": (
        Fault(
            "cuda/device.h", "  P pack;\n  if (vectorized && left >= n) {", "  P pack;\n  if (vectorized) {", "cuda/adamw.cu"
        ),
        "layouts",
        "AddressSanitizer",
    ),
    "a vector begins before a row's end and goes on behind it": (
        Fault("cuda/cross_entropy.cu", "(width - head) / n", "(width - head + n - 1) / n", "cuda/cross_entropy.cu"),
        "layouts",
        "AddressSanitizer",
    ),
    "a row's vectors do not begin where they are aligned": (
        Fault("cuda/cross_entropy.cu", " % 16)) % 16 / int(sizeof(T))", " % 16)) % 16 / 16", "cuda/cross_entropy.cu"),
        "layouts",
        "what is moved at once is not aligned",
    ),
    "a vector that only begins in a tensor": (
        Fault("cuda/gated.cu", "to[k] = vectorized && vec.left >= n", "to[k] = vectorized && vec.left > 0", "cuda/gated.cu"),
        "layouts",
        "AddressSanitizer",
    ),
    "heads behind the last one": (
        Fault("cuda/rotary.cu", "      if (work.first + k * heads.threads >= heads.count) continue;\n", "", "cuda/rotary.cu"),
        "layouts",
        "AddressSanitizer",
    ),
    "a backward takes the sines of a forward": (
        Fault("cuda/rotary.cu", "a.backward && !a.interleaved ? 1 - side : side", "side", "cuda/rotary.cu"),
        "layouts",
        "AssertionError",
    ),
    "an exchange with the wrong lane": (
        Fault("cuda/device.h", "x[k], distance)", "x[k], distance > 1 ? distance : 2)", "cuda/rms_norm.cu"),
        "schedules",
        "AssertionError",
    ),
    "more shared memory than was asked for": (
        Fault("cuda/norm.h", "shape.shared += shape.rows * bytes;", "shape.shared += bytes;", "cuda/layer_norm.cu"),
        "schedules",
        "AddressSanitizer",
    ),
    "a number is taken for a tensor of another place": (
        Fault("cuda/adamw.cu", "2 * shard.place", "2 * shard.first_block", "cuda/adamw.cu"),
        "extremes",
        "AssertionError",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_planted_fault_is_noticed(fault: str) -> None:
    planted, check, says = _FAULTS[fault]
    completed: subprocess.CompletedProcess[str] = emulated.run(emulated.build(planted), check)
    assert completed.returncode != 0 and says in completed.stderr, completed.stdout + completed.stderr
