"""Building and loading the library: what is built when, which one is taken, and what is said where none can be."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from shardcomp.errors import KernelError
from shardcomp.kernels import build, library

ROOT = Path(__file__).parents[2]
OWN = library.load()
built = pytest.mark.skipif(OWN.kind == "reference", reason="there is no library")

COMPILER = """#!/bin/sh
# A compiler that takes no time: what it links is a library that there is already.
case "$*" in
  *--version*) echo "pretended 1.0" ;;
  *-shared*) sleep 0.2; echo link >> "{log}"; cp "{real}" kernels.so ;;
  *) for each; do made=$each; done; echo compile >> "{log}"; touch "$made" ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of its own, and a compiler that notes what it is asked in `log`."""
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(log=tmp_path / "log", real=OWN.path))
    compiler.chmod(0o755)
    monkeypatch.setenv("SHARDCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # where there is no nvcc
    monkeypatch.setattr(library, "_open", lambda path: None)  # this process has loaded one
    monkeypatch.setattr(library, "PACKAGED", tmp_path / "_kernels.so")
    return tmp_path


def links(here: Path) -> int:
    log = here / "log"
    return log.read_text().split().count("link") if log.exists() else 0


@pytest.mark.skipif(os.environ.get(library.VARIABLE) == "reference", reason="the references are asked for")
def test_there_is_a_library_wherever_one_can_be_built() -> None:
    try:
        build.recipe([build.own_level()])
    except build.BuildError as error:
        pytest.skip(str(error))
    assert OWN.kind in ("aot", "jit"), OWN.why


@built
def test_a_library_is_built_once_and_found_from_then_on(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = library._load("jit")
    assert first.kind == "jit" and first.path is not None and first.path.exists() and links(here) == 1
    assert "building" in capfd.readouterr().err
    again = library._load("auto")
    assert again.path == first.path and again.why.startswith("built before") and links(here) == 1
    assert capfd.readouterr().err == ""
    assert sorted(each.suffix for each in (here / "cache").iterdir()) == [".lock", ".so"]


@built
@pytest.mark.parametrize("change", ["flags", "source", "compiler"])
def test_what_a_library_depends_on_builds_it_anew(here: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    first = library._load("jit").path
    if change == "flags":
        monkeypatch.setenv("CXXFLAGS", "-DANYTHING")
    elif change == "compiler":
        compiler = Path(os.environ["CXX"])
        compiler.write_text(compiler.read_text().replace("1.0", "1.1"))
    else:
        subprocess.run(["cp", "-rL", str(build.SOURCES), str(here / "csrc")], check=True)
        monkeypatch.setattr(build, "SOURCES", here / "csrc")
        assert library._load("jit").path == first  # wherever they lie
        with (here / "csrc" / "cpu" / "sums.h").open("a") as header:
            header.write("\n")
    assert library._load("jit").path != first and links(here) == 2


@built
def test_processes_that_need_one_at_once_build_it_once(here: Path) -> None:
    code = "from shardcomp.kernels import library; print(library.load().path)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHARDCOMP_KERNELS": "jit"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(said) == 1 and links(here) == 1


@built
def test_an_installed_library_is_taken_first(here: Path) -> None:
    library.PACKAGED.touch()
    for word in ("auto", "aot"):
        found = library._load(word)
        assert found.kind == "aot" and found.path == library.PACKAGED and links(here) == 0
    assert library._load("jit").kind == "jit"


@built
def test_one_that_cannot_be_loaded_is_passed_over_with_the_reason(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("SHARDCOMP_CACHE", str(here / "cache"))
    monkeypatch.setattr(library, "PACKAGED", here / "_kernels.so")
    library.PACKAGED.write_text("no library")
    monkeypatch.setattr(library, "_built", lambda: (OWN.path, "built before"))
    assert "_kernels.so cannot be loaded" in library._load("auto").why
    with pytest.raises(KernelError, match="cannot be loaded"):
        library._load("aot")


def test_without_a_compiler_references_run_and_one_warning_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "there-is-none")
    with caplog.at_level(logging.INFO):
        assert library._load("auto").kind == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "there-is-none" in caplog.text
    caplog.clear()
    with pytest.raises(KernelError, match="SHARDCOMP_KERNELS=jit: no C.. compiler was found"):
        library._load("jit")
    with pytest.raises(KernelError, match="SHARDCOMP_KERNELS=aot: none is installed"):
        library._load("aot")
    assert not caplog.records


def test_a_build_that_fails_says_what_the_compiler_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Path(os.environ["CXX"])
    compiler.write_text('#!/bin/sh\necho "there is a fault on line 7" >&2\nexit 1\n')
    with pytest.raises(KernelError, match="fault on line 7"):
        library._load("jit")
    assert not list((here / "cache").glob("*.so*"))


def test_references_run_where_they_are_asked_for(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert library._load("reference").path is None
    assert [record.levelname for record in caplog.records] == ["INFO"] and links(here) == 0


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(KernelError, match="no such choice; it is one of auto, aot, jit, reference"):
        library._load("cuda")


def test_importing_shardcomp_loads_nothing() -> None:
    code = "from shardcomp.kernels import library; assert library._loaded is None"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHARDCOMP_KERNELS": "none"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_first_operator_says_what_is_wrong_with_the_choice() -> None:
    code = "import torch, shardcomp.kernels as k; k.rms_norm(torch.ones(2, 3), eps=1e-5)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHARDCOMP_KERNELS": "none"}
    completed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 1 and completed.stderr.endswith("it is one of auto, aot, jit, reference\n")


# The functions of torch 2.11's stable interface that the library calls. A further one must be looked up there.
_AOTI = """abi_version aten_full aten_subtract_Tensor create_device_guard delete_device_guard delete_library_object
delete_tensor_object get_device_index get_device_type get_dim get_dtype get_numel get_size get_sizes get_stride
library_init_impl new_tensor_handle"""
_TORCH = """call_dispatcher delete_list delete_string get_const_data_ptr get_mutable_data_ptr library_impl list_get_item
list_push_back list_size new_list_reserve_size new_string_handle parallel_for string_c_str string_length"""
TORCH = {*(f"aoti_torch_{name}" for name in _AOTI.split()), *(f"torch_{name}" for name in _TORCH.split())}
CONSTANT = re.compile(r"(aoti_)?torch_(dtype|layout|device_type|memory_format)_\w+")


def needed(artifact: Path | None) -> set[str]:
    """What a library needs of torch, but for constants."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(artifact)], capture_output=True, text=True, check=True).stdout
    names = set(re.findall(r"\b[Uw] (\S+)", listed))
    return {name for name in names if ("torch" in name or "c10" in name) and not CONSTANT.fullmatch(name)}


@built
def test_the_library_needs_nothing_that_the_oldest_torch_lacks() -> None:
    assert "aoti_torch_library_init_impl" in needed(OWN.path) <= TORCH


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_just_in_time_kernels_of_cuda_are_built_only_for_a_torch_with_cuda(
    here: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None
) -> None:
    asked: list[bool | None] = []
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(library, "recipe", lambda levels, cuda: asked.append(cuda) or build.recipe(levels, cuda=False))
    library._built()
    assert asked == [None if cuda else False]


@built
def test_where_nvcc_fails_the_kernels_of_the_cpu_run_and_a_warning_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvcc = here / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    fails = f'echo nvcc >> "{here / "log"}"; echo "unsupported compiler" >&2; exit 1'
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "pretended 1.0" ;; *) {fails} ;; esac\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(here / "toolkit"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv(library.VARIABLE, "jit")
    with pytest.raises(KernelError, match="unsupported compiler"):
        library._load("jit")
    monkeypatch.setenv(library.VARIABLE, "auto")
    tried = []
    for _ in range(2):
        caplog.clear()
        assert library._load("auto").kind == "jit"
        assert [record.levelname for record in caplog.records if "nvcc could not" in record.message] == ["WARNING"]
        tried.append((here / "log").read_text().count("nvcc"))
    assert tried[0] == tried[1] and "unsupported compiler" in next((here / "cache").glob("*.refused")).read_text()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a wheel is made of, without what was built there."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "shardcomp", "passes", "policies", "csrc"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    library_of_the_checkout = tmp_path / "shardcomp" / "_kernels.so"
    library_of_the_checkout.unlink(missing_ok=True)
    return tmp_path


def wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "-w", "wheels", "."]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False)


@built
@pytest.mark.long  # compiles, and installs into an environment of its own
def test_a_library_that_is_built_ahead_of_time_is_installed_and_runs(source: Path) -> None:
    completed = wheel(source, CPU_EXT="1", CXXFLAGS="-O0")  # in half the time
    assert completed.returncode == 0, completed.stderr
    (artifact,) = (source / "wheels").iterdir()
    assert re.fullmatch(r"shardcomp-[^-]+-py3-none-linux_[a-z0-9_]+\.whl", artifact.name) and artifact.stat().st_size < 2 << 20
    with zipfile.ZipFile(artifact) as held:
        held.extractall(source / "installed")
        sources = {name for name in held.namelist() if "/csrc/" in name}
    assert len(sources) == sum(each.is_file() for each in build.SOURCES.rglob("*"))
    code = """if True:
        import torch, shardcomp
        from shardcomp.kernels import library, rms_norm
        assert library.load().kind == "aot", library.load()
        x = torch.arange(12.0).reshape(3, 4)
        torch.testing.assert_close(rms_norm(x, eps=1e-5), torch.nn.functional.rms_norm(x, (4,), eps=1e-5))
        print(shardcomp.__file__)"""
    environment = {key: held for key, held in os.environ.items() if key != "SHARDCOMP_KERNELS"}
    environment["PYTHONPATH"] = str(source / "installed")
    ran = subprocess.run([sys.executable, "-c", code], cwd=source / "wheels", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith(str(source / "installed")), ran.stderr


def test_a_plain_wheel_is_pure_python_and_needs_no_compiler(source: Path) -> None:
    completed = wheel(source, CXX="there-is-none", CPU_EXT="", CUDA_EXT="")
    assert completed.returncode == 0, completed.stderr
    (artifact,) = (source / "wheels").iterdir()
    with zipfile.ZipFile(artifact) as held:
        names = held.namelist()
    assert artifact.name.endswith("-py3-none-any.whl") and not any(name.endswith(".so") for name in names)
    assert "shardcomp/csrc/cpu/kernels.h" in names


def test_what_cannot_be_built_ahead_of_time_is_one_clear_error(source: Path) -> None:
    for environment, says in (
        ({"CPU_EXT": "1", "CXX": "there-is-none"}, "CPU_EXT=1: no C++ compiler was found (there-is-none)"),
        ({"CUDA_EXT": "1", "CUDA_HOME": str(source)}, "CUDA_EXT=1: nvcc was not found: install the CUDA toolkit"),
    ):
        completed = wheel(source, **environment)
        assert completed.returncode != 0 and says in completed.stdout + completed.stderr


@built
@pytest.mark.long
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    code = """if True:
        import hashlib, sys, torch
        from shardcomp.kernels import library
        torch.ops.load_library(sys.argv[1])
        library._loaded = library.Library("jit", None, "")
        from kernels.test_library import calls, results
        found = hashlib.sha256()
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for name, given in calls(dtype, 67).items():
                for each in results(name, given):
                    found.update(each.flatten().view(torch.uint8).numpy().tobytes())
        print(found.hexdigest())"""
    digests = set()
    for level in build.LEVELS:
        artifact = tmp_path / f"{level.name}.so"
        build.build(build.recipe([level]), artifact)
        command = [sys.executable, "-c", code, str(artifact)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        if set(level.needs) <= set(build.own_level().needs):
            digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
