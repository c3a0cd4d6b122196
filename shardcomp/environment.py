"""What this machine has: versions, devices, and what runs each fused operator on them, found out by running it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from shardcomp import __version__
from shardcomp.collectives import Axis
from shardcomp.kernels import attention, cross_entropy, vocab_embedding


def environment() -> dict[str, Any]:
    """`versions` {package: version}, `devices` [{device, name, memory}], `kernels` [{name, device, runs, ok, why}]."""
    devices = _devices()
    kernels = [_try(name, device["device"]) for device in devices for name in _CALLS]
    return {"versions": _versions(), "devices": devices, "kernels": kernels}


def _versions() -> dict[str, str]:
    found = {"shardcomp": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "sympy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator; `memory` in bytes, None for the CPU."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine(), "memory": None}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory})
    return found


def _attention(device: torch.device) -> Tensor:
    q, k, v = (torch.randn(1, heads, 8, 16, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    found = attention(q, k, v, causal=True, scale=0.25)
    return found[0] if isinstance(found, tuple) else found


def _cross_entropy(device: torch.device) -> Tensor:
    logits = torch.randn(8, 32, device=device, requires_grad=True)
    return cross_entropy(logits, torch.arange(8, device=device), -100)


def _embedding(device: torch.device) -> Tensor:
    weight = torch.randn(32, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    return vocab_embedding(weight, torch.arange(8, device=device), -1, 32, Axis("tp", 1, 0))


_CALLS: dict[str, tuple[Callable[[torch.device], Tensor], str]] = {
    "attention": (_attention, "torch scaled_dot_product_attention"),
    "cross_entropy": (_cross_entropy, "torch, the operator's reference"),
    "embedding": (_embedding, "torch, the operator's reference"),
}
"""Operator -> (a small call of it, what runs it)."""


def _try(name: str, device: str) -> dict[str, Any]:
    """Run an operator forward and backward; what it says goes into the answer, whatever goes wrong."""
    call, runs = _CALLS[name]
    try:
        result = call(torch.device(device))
        result.float().sum().backward()
        ok = bool(result.isfinite().all())
        why = "its only provider; ran forward and backward" if ok else "ran, but its result is not finite"
    except Exception as error:
        ok, why = False, f"{type(error).__name__}: {error}"
    return {"name": name, "device": device, "runs": runs, "ok": ok, "why": why}
