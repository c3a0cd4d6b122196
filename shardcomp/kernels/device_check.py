"""Kernels of a device are compared with their references before they may run there.

The tests of a build do not cover every GPU. So a CUDA kernel is first registered in a namespace of its own. When its operator
first runs on a GPU in a process, the kernel and the reference run on small inputs. If they agree, the kernel is registered as
the implementation of the operator, and later calls reach it without a check.

The comparison needs values: it waits while a graph is traced, and while CUDA records one, during which the reference runs.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from shardcomp.errors import KernelError
from shardcomp.kernels import library, small_cases
from shardcomp.torch_private import DisableTorchFunction, disable_current_modes, dispatch_has_kernel

SPACES = {"cuda": "shardcomp_cuda"}
"""Kind of device -> the namespace of its unchecked kernels."""
_log = logging.getLogger("shardcomp.kernels")
_lock = threading.Lock()
_rejected: dict[tuple[str, str], str] = {}
"""(operator, kind of device) -> why its kernel does not run there."""


def in_place(name: str, device: torch.device, reference: Callable[..., Any]) -> bool:
    """Whether a kernel is registered for an operator on a device. The first call for a kind of device compares it first.

    If the kernel fails, the caller runs the reference, and one warning says why.

    Raises:
        KernelError: the kernel failed, and `SHARDCOMP_KERNELS` demands the library by its name.
    """
    # The common case first and without a lock; it also loads the library.
    if library.provides(name, device.type):
        return True
    if device.type not in SPACES or not _waits(name, device.type):
        return False
    with _lock:
        # Another thread may have registered it meanwhile.
        if library.provides(name, device.type):
            return True
        if (name, device.type) not in _rejected:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            try:
                _compare(name, device, reference)
                _put_in_place(name)
                return True
            # On a device that nobody tried a kernel may fail in any way, and the reference can still run.
            except Exception as error:
                _reject(name, device, f"{type(error).__name__}: {error}")
    if (word := library.choice()) != "auto":
        raise KernelError(
            f"{library.VARIABLE}={word}: its kernel of {name} must not run on {device}: {_rejected[name, device.type]}\n"
            f"{library.VARIABLE}=auto takes the operator's reference instead"
        )
    return False


def why_not(name: str, device: torch.device) -> str | None:
    """Why the kernel of an operator does not run, or None if it was not tried or did not fail."""
    return _rejected.get((name, device.type))


def _waits(name: str, kind: str) -> bool:
    return bool(dispatch_has_kernel(f"{SPACES[kind]}::{name}", kind.upper()))


def _compare(name: str, device: torch.device, reference: Callable[..., Any]) -> None:
    """Compare without the caller's modes, autocast and gradients, which would change or record the calls."""
    with ExitStack() as isolated:
        for context in (disable_current_modes(), DisableTorchFunction(), torch.no_grad()):
            isolated.enter_context(context)
        isolated.enter_context(torch.autocast(device.type, enabled=False))
        candidate = getattr(getattr(torch.ops, SPACES[device.type]), name)
        small_cases.compare(name, candidate, reference, device)


def _put_in_place(name: str) -> None:
    ctypes.CDLL(str(library.load().path)).shardcomp_put_in_place(name.encode())


def _reject(name: str, device: torch.device, why: str) -> None:
    _rejected[name, device.type] = " ".join(why.split())
    if library.choice() == "auto":
        _log.warning("kernels: %s runs as its reference on %s: %s", name, device, _rejected[name, device.type])
