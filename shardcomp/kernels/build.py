"""Builds the library of kernels from csrc/ with a ninja file: ahead of time for setup.py, just in time for `library.py`.

Why not torch.utils.cpp_extension: with a CPU-only torch it refuses to compile CUDA, and its C++ headers tie the library to one
version of torch and take a minute to compile. The sources use torch's stable ABI instead, so one library runs in every torch
from 2.11 on, with or without CUDA. This module imports neither torch nor the rest of shardcomp, so that setup.py can load it
alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
TORCH_TARGET = "0x020b000000000000"
"""torch 2.11, the oldest that the library supports. A library that was built with a newer torch runs with it as well."""

_SHARED = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# The sources determine every bit of a result, so a product and a sum are never contracted into one rounding. The other flags
# change no value: no kernel reads errno or floating-point exceptions.
_KERNEL = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-maybe-uninitialized")
# C++17, because nvcc takes as long for the headers of C++20 as for a kernel. -O1 is for host code alone. --fmad=false is nvcc's
# -ffp-contract=off. The fatbin is compressed: most of the file is code for architectures that a machine does not have.
CUDA_FLAGS = ("-std=c++17", "-O1", "--fmad=false", "-Xfatbin=-compress-all", "-Xcompiler", "-fPIC,-fvisibility=hidden")


class BuildError(Exception):
    """The library cannot be built here. The text says why, in one line or with the compiler's output."""


@dataclass(frozen=True)
class Level:
    """An instruction set that the CPU's kernels are compiled for. needs: the processor flags that it requires."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


_BASE = Level("base", ("-O1",))
_V3 = Level("v3", ("-O1", "-march=x86-64-v3"), ("avx2", "fma", "bmi1", "bmi2"))
_V4 = Level("v4", ("-O2", "-march=x86-64-v4"), (*_V3.needs, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"))
LEVELS = (_BASE, _V3, _V4) if platform.machine() == "x86_64" else (Level("base", ("-O2",)),)


def own_level() -> Level:
    """The best level for this processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return LEVELS[0]
    has = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())
    return [level for level in LEVELS if has.issuperset(level.needs)][-1]


@dataclass(frozen=True)
class Recipe:
    """Everything that a build depends on.

    levels: the instruction sets of the CPU's kernels; of several, the library chooses the best one at run time. nvcc: the
    compiler of csrc/cuda, or None to leave CUDA out.
    """

    compiler: str
    ninja: str
    levels: tuple[Level, ...]
    nvcc: str | None = None

    def key(self) -> str:
        """A hash of sources, headers, flags and compilers. A change of any builds the library anew."""
        digest = hashlib.sha256()
        for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(SOURCES)}\0".encode() + path.read_bytes() + b"\0")
        tools = [tool for tool in (self.compiler, self.nvcc) if tool]
        versions = [_run([tool, "--version"]) for tool in tools]
        # Without the folder of the sources: copies of one checkout share a library.
        statements = "\n".join(_statements(self, Path())).replace(str(SOURCES), "")
        digest.update(repr((statements, versions)).encode())
        return digest.hexdigest()[:24]


def recipe(levels: Sequence[Level], cuda: bool | None = None) -> Recipe:
    """The recipe of a build on this machine.

    Args:
        levels: the instruction sets of the CPU's kernels.
        cuda: whether to compile csrc/cuda; None: if nvcc exists.

    Raises:
        BuildError: a tool or the sources are missing.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler was found ({', '.join(names)}): install g++ or clang, or name one in CXX")
    ninja = _ninja()
    if ninja is None:
        raise BuildError("ninja was not found: pip install ninja")
    if not (SOURCES / "cpu").is_dir():
        raise BuildError(f"the sources are missing: there is no {SOURCES / 'cpu'}")
    nvcc = _nvcc() if cuda is not False else None
    if cuda and nvcc is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit, or name its folder in CUDA_HOME")
    return Recipe(compiler, ninja, tuple(levels), nvcc)


def build(how: Recipe, target: Path) -> None:
    """Build the library as the file `target`, which appears complete or not at all.

    Raises:
        BuildError: the compiler failed; the text has its output.
    """
    # Beside the target, so that the last step is a rename within one file system.
    work = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        (work / "build.ninja").write_text("\n".join(_statements(how, _torch())) + "\n")
        run = subprocess.run([how.ninja, "-C", str(work)], capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"the build failed:\n{run.stdout}{run.stderr}")
        os.replace(work / "kernels.so", target)  # atomic: no process loads half a file
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _statements(how: Recipe, torch: Path) -> list[str]:
    """The lines of the ninja file."""
    extra = os.environ.get("CXXFLAGS", "")
    one = () if len(how.levels) > 1 else (f"-DSHARDCOMP_ONE_LEVEL={how.levels[0].name}",)
    headers = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem {torch / 'include'}")
    lines = [
        "rule compile",
        f"  command = {how.compiler} {' '.join(_SHARED)} $flags {extra} -c $in -o $out",
        "rule link",
        f"  command = {how.compiler} -shared -s $in -o $out $flags",
    ]
    objects = []

    def compiled(rule: str, source: Path, name: str, flags: Sequence[str]) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: {rule} {_escaped(source)}", f"  flags = {' '.join(flags)}"])

    def together(rule: str, folder: str, pattern: str, parts: int, flags: Sequence[str] = (), end: str = "") -> None:
        """Compile a folder in `parts` units: the compiler takes as long for its headers as for several kernels."""
        for at in range(parts):
            *before, last = sorted((SOURCES / folder).glob(pattern))[at::parts]
            compiled(rule, last, f"{folder}_{at}{end}", [*flags, *(f'-include "{_escaped(source)}"' for source in before)])

    if how.nvcc:
        lines += [
            "rule nvcc",
            f"  command = {how.nvcc} {' '.join((*CUDA_FLAGS, *targets()))} $flags -c $in -o $out",
            "rule link_cuda",
            f"  command = {how.nvcc} -shared -cudart static -Xlinker -s $in -o $out $flags",
        ]
        together("nvcc", "cuda", "*.cu", 2)
        compiled("nvcc", SOURCES / "binding" / "cuda.cpp", "binding_cuda", headers)
    compiled("compile", SOURCES / "binding" / "cpu.cpp", "binding_cpu", ("-O1", *headers, *one))
    for level in how.levels[::-1]:
        together("compile", "cpu", "*.cpp", 3, (*level.flags, *_KERNEL, f"-DSHARDCOMP_LEVEL={level.name}"), f"_{level.name}")
    link = "link_cuda" if how.nvcc else "link"
    lines += [f"build kernels.so: {link} {' '.join(objects)}", f"  flags = -L{torch / 'lib'} -ltorch_cpu"]
    return lines


def targets() -> list[str]:
    """nvcc's options for the architectures.

    PTX for the oldest architecture is generated once and compiled for each. The library also contains it, for newer devices.
    """
    archs = sorted(os.environ.get("SHARDCOMP_CUDA_ARCHS", "80;90").split(";"), key=lambda arch: (len(arch), arch))
    return [f"-gencode=arch=compute_{archs[0]},code=[{','.join((*(f'sm_{arch}' for arch in archs), f'compute_{archs[0]}'))}]"]


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _torch() -> Path:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch, whose headers are needed, is not installed: with pip, --no-build-isolation shows it to the build"
        )
    return Path(spec.submodule_search_locations[0])


def _candidates() -> Iterator[str | None]:
    if spec := importlib.util.find_spec("ninja"):
        yield from (str(Path(place) / "data" / "bin" / "ninja") for place in spec.submodule_search_locations or ())
    yield str(Path(sys.executable).parent / "ninja")
    yield "ninja"


def _ninja() -> str | None:
    return next((path for name in _candidates() if name and (path := shutil.which(name))), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
