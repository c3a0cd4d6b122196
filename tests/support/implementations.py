"""The operators' references in the place of the library's kernels, for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardcomp.kernels import library
from shardcomp.kernels.register import REFERENCES


@contextmanager
def references() -> Iterator[None]:
    """What runs on the CPU is every operator's reference."""
    held = torch.library.Library("shardcomp", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in filter(lambda name: library.provides(name, "cpu"), REFERENCES):
                held.impl(name, REFERENCES[name], "CPU", allow_override=True)
        yield
    finally:
        held._destroy()
