"""Builds the library of kernels into the package where `CPU_EXT=1` or `CUDA_EXT=1` asks for it; else nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CUDA = os.environ.get("CUDA_EXT") == "1"
ASKED = CUDA or os.environ.get("CPU_EXT") == "1"


class Build(build_py):
    """Copies the package, and puts the library beside it."""

    def run(self) -> None:
        super().run()
        if not ASKED:
            return
        found = importlib.util.spec_from_file_location("kernels_build", HERE / "shardcomp" / "kernels" / "build.py")
        assert found is not None and found.loader is not None
        code = importlib.util.module_from_spec(found)
        sys.modules[found.name] = code
        found.loader.exec_module(code)
        home = HERE / "shardcomp" if self.editable_mode else Path(self.build_lib) / "shardcomp"
        try:
            code.build(code.recipe(code.LEVELS, cuda=CUDA), home / "_kernels.so")
        except code.BuildError as error:
            sys.exit(f"{'CUDA_EXT' if CUDA else 'CPU_EXT'}=1: {error}")


class Wheel(bdist_wheel):
    """A wheel of the library is for this system, with any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        if not ASKED:
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]


class Package(Distribution):
    """What is installed, which is pure Python unless the library is built."""

    def has_ext_modules(self) -> bool:
        return ASKED


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=Package)
