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
from shardcomp.kernels import attention, cross_entropy, library, vocab_embedding
from shardcomp.kernels.operators import REFERENCES


def environment() -> dict[str, Any]:
    """`versions` {package: version}, `devices` [{device, name, memory}], `kernels` [{name, device, runs, ok, why}]."""
    devices = _devices()
    names = [device["device"] for device in devices]
    kernels = [_compare(name, device) for device in names for name in _FUSED]
    kernels += [_try(name, device) for device in names for name in _CALLS]
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


def _fused() -> dict[str, dict[str, tuple[Any, ...]]]:
    """Operator -> a small call of it and one of its backward: name -> arguments."""
    draw = torch.Generator().manual_seed(0)
    x, y, w, b = (torch.randn(shape, generator=draw) for shape in ((3, 5, 16), (3, 5, 16), (16,), (16,)))
    moment = torch.rand((3, 5, 1), generator=draw)
    heads, table = torch.randn((2, 3, 5, 16), generator=draw), torch.randn((5, 16), generator=draw)
    return {
        "rms_norm": {"rms_norm": (x, w, 1e-5, 0.0, True), "rms_norm_bwd": (y, None, x, w, moment, 0.0)},
        "add_rms_norm": {"add_rms_norm": (x, y, w, 1e-5, 0.0, True), "rms_norm_bwd": (y, x, x, w, moment, 0.0)},
        "layer_norm": {"layer_norm": (x, w, b, 1e-5, False), "layer_norm_bwd": (y, x, w, b, moment, moment)},
        "rotary": {
            "rotary": (heads, heads, table.cos(), table.sin(), False, True),
            "rotary_bwd": (heads, heads, table.cos(), table.sin(), False),
        },
        "swiglu": {"gated": (x, y, "silu", True), "gated_bwd": (y, x, y, "silu")},
        "geglu": {"gated": (x, y, "gelu", True), "gated_bwd": (y, x, y, "gelu")},
    }


_FUSED = _fused()


def _compare(name: str, device: str) -> dict[str, Any]:
    """Run an operator and its backward, and compare both with their references."""
    found = {"name": name, "device": device, "runs": "reference", "ok": True}
    try:
        loaded = library.load()
        if all(library.provides(each, device.partition(":")[0]) for each in _FUSED[name]):
            found["runs"] = f"{loaded.kind} library"
            found["why"] = f"forward and backward are near their references; {loaded.why}"
        elif loaded.kind == "reference":
            found["why"] = loaded.why
        else:
            found["why"] = f"the {loaded.kind} library has no kernel of it for this device"
        for each, arguments in _FUSED[name].items():
            given = [held.to(device) if isinstance(held, Tensor) else held for held in arguments]
            made, expected = getattr(torch.ops.shardcomp, each)(*given), REFERENCES[each](*given)
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    except Exception as error:
        found |= {"runs": "nothing", "ok": False, "why": f"{type(error).__name__}: {error}"}
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
