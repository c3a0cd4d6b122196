"""Kernels of devices that not every build is tried on: each waits under a name of its own until it has given, on the device
that is there, what the operator's reference gives. Then it takes its place among the operators, and nothing stands before it.

It is called for this once in a process, on small inputs, when its operator first runs on such a device, with values: not while
a graph is traced, and not while CUDA records one, during which the reference runs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from shardcomp.errors import KernelError
from shardcomp.kernels import library, small_cases

SPACES = {"cuda": "shardcomp_cuda"}
"""The kind of device -> the namespace in which its kernels wait."""
_log = logging.getLogger("shardcomp.kernels")
_lock = threading.Lock()
_rejected: dict[tuple[str, str], str] = {}
"""(operator, kind of device) -> why its kernel does not run."""


def in_place(name: str, device: torch.device, reference: Callable[..., Any]) -> bool:
    """Whether a kernel runs for an operator on a device; the first call for that kind of device finds out whether one may.

    Raises KernelError for one that must not where `SHARDCOMP_KERNELS` names its library; else the reference is to run, and one
    warning says why.
    """
    if library.provides(name, device.type):
        return True
    if device.type not in SPACES or not _waits(name, device.type):
        return False
    with _lock:
        if library.provides(name, device.type):
            return True
        if (name, device.type) not in _rejected:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            try:
                _compare(name, device, reference)
                _put_in_place(name)
                return True
            except Exception as error:
                _reject(name, device, f"{type(error).__name__}: {error}")
    if (word := os.environ.get(library.VARIABLE, "auto")) != "auto":
        raise KernelError(
            f"{library.VARIABLE}={word}: its kernel of {name} must not run on {device}: {_rejected[name, device.type]}\n"
            f"{library.VARIABLE}=auto takes the operator's reference instead"
        )
    return False


def why_not(name: str, device: torch.device) -> str | None:
    """Why the kernel of an operator does not run, if it was tried."""
    return _rejected.get((name, device.type))


def _waits(name: str, kind: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{SPACES[kind]}::{name}", kind.upper())


def _compare(name: str, device: torch.device, reference: Callable[..., Any]) -> None:
    """As if nobody were around: no modes, no autocast, no gradients."""
    with ExitStack() as alone:
        for each in (_disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad()):
            alone.enter_context(each)
        alone.enter_context(torch.autocast(device.type, enabled=False))
        candidate = getattr(getattr(torch.ops, SPACES[device.type]), name)
        small_cases.compare(name, candidate, reference, device)


def _put_in_place(name: str) -> None:
    ctypes.CDLL(str(library.load().path)).shardcomp_put_in_place(name.encode())


def _reject(name: str, device: torch.device, why: str) -> None:
    _rejected[name, device.type] = " ".join(why.split())
    if os.environ.get(library.VARIABLE, "auto") == "auto":
        _log.warning("kernels: %s runs as its reference on %s: %s", name, device, _rejected[name, device.type])
