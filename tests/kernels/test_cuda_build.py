"""What nvcc makes of CUDA's kernels: no register is spilled, memory is moved 16 bytes at a time. `pytest -s` prints a table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.test_build import ROOT, TORCH, needed

from shardcomp.kernels import build

NVCC = build._nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

# Loads and stores of 16 bytes that each kernel has at least, for each element that it goes through once.
MOVES = {
    "rms_norm": (4, 2),
    "rms_norm_bwd": (4, 1),
    "rms_norm_held": (12, 8),
    "rms_norm_bwd_held": (12, 4),
    "layer_norm": (3, 1),
    "layer_norm_bwd": (3, 1),
    "layer_norm_held": (12, 4),
    "layer_norm_bwd_held": (6, 2),
    "rotary": (12, 9),
    "gated": (4, 2),
    "gated_flat": (4, 2),
    "gated_bwd": (3, 2),
    "statistics": (4, 0),
    "gradient": (1, 1),
    "adamw": (3, 3),
    "squares": (4, 0),
}
PLAIN = {"summed", "adamw_numbers", "squares_sum", "rotary_apart"}
"""Kernels that go through little, or through what lies in no order that 16 bytes fit in."""
KERNEL = re.compile(rf"\d({'|'.join(sorted(MOVES | dict.fromkeys(PLAIN), key=len, reverse=True))})(?:I|E)")
SIXTEEN = r"(?:v4\.[a-z]32|v2\.[a-z]64)"


def compile_kernels(source: Path, folder: Path) -> tuple[dict[tuple[str, str], list[int]], dict[str, tuple[int, int]]]:
    """(architecture, symbol) -> stack, spilled bytes, registers; symbol -> loads and stores of 16 bytes."""
    command = [str(NVCC), *build.CUDA_FLAGS, *build.targets(), "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    completed = subprocess.run(
        [*command, "-c", str(source), "-o", str(folder / "made.o")], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    used = {}
    report = r"function '(\w+)' for '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes spill.*?Used (\d+) registers"
    for name, arch, *numbers in re.findall(report, completed.stderr, re.DOTALL):
        stack, stored, loaded, registers = map(int, numbers)
        used[arch, name] = [stack, stored + loaded, registers]
    moves = {}
    for text in folder.glob("*.ptx"):
        for entry in text.read_text().split(".entry ")[1:]:
            loads, stores = (len(re.findall(rf"\b{kind}\.global(?:\.nc)?\.{SIXTEEN}", entry)) for kind in ("ld", "st"))
            copies = len(re.findall(r"\bcp\.async\.cg\.shared\.global", entry))
            moves[entry.split("(")[0].strip()] = loads + copies, stores
    return used, moves


@pytest.mark.parametrize("source", sorted((build.SOURCES / "cuda").glob("*.cu")), ids=lambda source: source.stem)
def test_kernels_keep_to_their_registers_and_move_16_bytes_at_a_time(source: Path, tmp_path: Path) -> None:
    used, moves = compile_kernels(source, tmp_path)
    assert {arch for arch, _ in used} == {"sm_80", "sm_90"} and {name for _, name in used} == set(moves)
    for (arch, symbol), (stack, spilled, registers) in sorted(used.items()):
        match = KERNEL.search(symbol)
        assert match, symbol
        loads, stores = moves[symbol]
        kernel, narrow = match[1], re.search("bf16|fp16", symbol[match.end() :])
        dtype = narrow[0] if narrow else {"f": "fp32", "d": "fp64"}.get(symbol[match.end()], "")
        print(f"{arch} {kernel:15} {dtype:5} {registers:4} registers {loads:3} loads {stores:3} stores of 16 bytes")
        assert stack == 0 and spilled == 0, f"{kernel} on {arch} has {stack} bytes of stack and spills {spilled}"
        if kernel in MOVES:
            assert loads >= MOVES[kernel][0] and stores >= MOVES[kernel][1], (
                f"{kernel}: {loads} loads, {stores} stores of 16 bytes"
            )


def test_a_kernel_that_stores_its_elements_one_by_one_is_seen(tmp_path: Path) -> None:
    shutil.copytree(build.SOURCES / "cuda", tmp_path / "cuda")
    shutil.copytree(build.SOURCES / "core", tmp_path / "core")
    header = tmp_path / "cuda" / "device.h"
    text = header.read_text()
    apart = text.replace(
        "  if (!vectorized || left < n) return keep(p, values, left, false);\n", "  return keep(p, values, left, false);\n"
    )
    assert apart != text
    header.write_text(apart)
    (tmp_path / "kept").mkdir()
    _, moves = compile_kernels(tmp_path / "cuda" / "adamw.cu", tmp_path / "kept")
    assert all(stores == 0 for _, stores in moves.values())


@pytest.mark.long  # compiles all kernels for CUDA
def test_a_library_with_them_loads_where_torch_has_no_cuda(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    build.build(build.recipe([build.own_level()], cuda=True), library)
    assert library.stat().st_size < 4 << 20 and needed(library) <= TORCH
    code = """if True:
        import sys, torch
        from shardcomp.kernels import device_check, library, register
        torch.ops.load_library(sys.argv[1])
        library._loaded = library.Library("aot", None, "")
        assert all(device_check._waits(name, "cuda") and library.provides(name, "cpu") for name in register.REFERENCES)
        assert not any(library.provides(name, "cuda") for name in register.REFERENCES)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHARDCOMP_KERNELS": "reference"}
    command = [sys.executable, "-c", code, str(library)]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
