"""Installs shardcomp. With `CPU_EXT=1` or `CUDA_EXT=1` it also builds the library of kernels into the package."""

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
WITH_LIBRARY = CUDA or os.environ.get("CPU_EXT") == "1"


class Build(build_py):
    """Copies the package and, if asked to, builds the library into it."""

    def run(self) -> None:
        super().run()
        if not WITH_LIBRARY:
            return
        # By its path: importing shardcomp would need torch, and the package's own dependencies, while it is being installed.
        spec = importlib.util.spec_from_file_location("kernels_build", HERE / "shardcomp" / "kernels" / "build.py")
        assert spec is not None and spec.loader is not None
        builder = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = builder
        spec.loader.exec_module(builder)
        package = HERE / "shardcomp" if self.editable_mode else Path(self.build_lib) / "shardcomp"
        try:
            builder.build(builder.recipe(builder.LEVELS, cuda=CUDA), package / "_kernels.so")
        except builder.BuildError as error:
            sys.exit(f"{'CUDA_EXT' if CUDA else 'CPU_EXT'}=1: {error}")


class Wheel(bdist_wheel):
    """A wheel with the library is for one system, but for any Python 3: the library does not use Python's C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        if not WITH_LIBRARY:
            return super().get_tag()
        return "py3", "none", super().get_tag()[2]


class Package(Distribution):
    """The distribution, which is pure Python unless it has the library."""

    def has_ext_modules(self) -> bool:
        return WITH_LIBRARY


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel}, distclass=Package)
