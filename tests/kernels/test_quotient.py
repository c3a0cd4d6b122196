"""The division of the gated kernels: its bits are those of any other division, however its first guess is rounded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shardcomp.kernels.build import SOURCES

_COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(_COMPILER is None, reason="there is no g++")

# Says how many quotients were looked at and how many differ. What is not a number is alike.
PROGRAM = """
#include "cuda/gated.cu"

#include <cstdio>

using namespace shardcomp::cuda;

static uint32_t bits(float x) { return x != x ? 0x7fc00000u : __float_as_uint(x); }
static long seen = 0, unlike = 0;

// The guess may be a unit in its last place too large or too small, and has no number below the normal ones. A divisor whose
// bits are all ones is the one for which these steps cannot correct a guess; a device's own division, which takes them as well,
// relies on that guess.
static void look(float x, float d) {
  for (int off = -1; off <= 1; ++off) {
    if (off != 0 && (__float_as_uint(d) & 0x7fffffu) == 0x7fffffu) continue;
    float about = 1.0f / (d * 0.25f);
    if (about > 0) about = __uint_as_float(__float_as_uint(about) + off);
    if (about < 0x1p-126f) about = 0;
    ++seen;
    unlike += bits(quotient(x, d, about)) != bits(x / d);
  }
}

static void look(float x) {
  const float d = 1.0f + expf(-x);
  look(x, d);
  look(1.0f, d);
}

int main() {
  for (uint32_t i = 0; i < 1u << 16; ++i) {
    look(widen(bf16{uint16_t(i)}));
    look(widen(fp16{uint16_t(i)}));
  }
  uint64_t state = 1;
  for (int i = 0; i < 3000000; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t drawn = uint32_t(state >> 32);
    const float share = drawn * 0x1p-32f;
    // Any float; what gates are; where no normal float is as small as 1 / d; and the least of all.
    const float kinds[] = {__uint_as_float(drawn), 40 * share - 20, -100 * share, __uint_as_float(drawn >> 9)};
    look(kinds[i % 4]);
  }
  printf("%ld %ld\\n", seen, unlike);
}
"""


def unlike(folder: Path, sources: Path) -> tuple[int, int]:
    """How many quotients were looked at, and how many differ."""
    (folder / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-DSHARDCOMP_EMULATED", "-w", f"-I{sources}"]
    files = [str(folder / "program.cpp"), str(sources / "emulation" / "device.cpp")]
    subprocess.run([str(_COMPILER), *flags, *files, "-o", str(folder / "program")], check=True)
    completed = subprocess.run([str(folder / "program")], capture_output=True, text=True, check=True)
    seen, differ = map(int, completed.stdout.split())
    return seen, differ


def test_every_narrow_number_and_many_others_have_the_quotient_of_a_division(tmp_path: Path) -> None:
    seen, differ = unlike(tmp_path, SOURCES)
    assert seen > 18_000_000 and differ == 0, f"{differ} of {seen} quotients are not those of a division"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("fmaf(first, fmaf(-finite, first, 1.0f), first)", "first"),
        ("return fmaf(-more, reciprocal, near);", "return near;"),
        ("fminf(d, most)", "d"),
        ("fminf(fmaf(finite, near, -x), most)", "fmaf(finite, near, -x)"),
        ("about * 0.25f", "d > 0x1p126f ? 0.0f : 1.0f / d"),  # what a device would make of it
    ],
)
def test_a_step_left_out_is_noticed(tmp_path: Path, line: str, fault: str) -> None:
    shutil.copytree(SOURCES, tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "gated.cu"
    text = source.read_text()
    assert line in text
    source.write_text(text.replace(line, fault))
    assert unlike(tmp_path, tmp_path / "csrc")[1] > 0
