"""What this machine has: versions, devices, and what runs each fused operator on them, which is tried out."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

import torch

from shardcomp import __version__
from shardcomp.errors import ShardError
from shardcomp.ir.collectives import Axis
from shardcomp.kernels import attention, device_check, library, small_cases, vocab_embedding
from shardcomp.kernels.attention_providers import PROVIDERS
from shardcomp.kernels.register import REFERENCES


class Device(TypedDict):
    """The CPU or a GPU."""

    device: str
    """As torch names it: cpu, cuda:0."""
    name: str
    memory: int | None
    """Bytes; None for the CPU."""


class KernelLibrary(TypedDict):
    """The library of kernels that is loaded."""

    kind: str
    path: str | None
    why: str


class KernelRun(TypedDict):
    """One fused operator on one device."""

    name: str
    device: str
    runs: str
    """What runs it: a library, the reference, torch, a provider of attention, or nothing."""
    ok: bool
    """Whether it ran, and its results and gradients equal the reference's."""
    why: str


class Environment(TypedDict):
    """What `shardcomp env --json` prints."""

    versions: dict[str, str]
    library: KernelLibrary
    devices: list[Device]
    kernels: list[KernelRun]


def environment() -> Environment:
    """Versions, devices, and the kernels that run here. Every kernel runs once on every device."""
    devices = _devices()
    names = [device["device"] for device in devices]
    kernels = [_try_operator(name, device) for device in names for name in small_cases.calls()]
    kernels += [_try_attention(provider, device) for device in names for provider in PROVIDERS]
    kernels += [_try_embedding(device) for device in names]
    return {"versions": versions(), "library": _library(), "devices": devices, "kernels": kernels}


def _library() -> KernelLibrary:
    """The library of kernels. If one was asked for by name and cannot be loaded: why."""
    try:
        loaded = library.load()
    except ShardError as error:
        return {"kind": "none", "path": None, "why": str(error)}
    return {"kind": loaded.kind, "path": str(loaded.path) if loaded.path else None, "why": loaded.why}


def versions() -> dict[str, str]:
    """Package -> its version, or "not installed", for the packages that a run depends on."""
    result = {"shardcomp": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "sympy"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    if torch.version.cuda:
        result["cuda"] = torch.version.cuda
    return result


def _devices() -> list[Device]:
    """The CPU and every GPU."""
    devices: list[Device] = [{"device": "cpu", "name": platform.processor() or platform.machine(), "memory": None}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory})
    return devices


def _try_operator(name: str, device_name: str) -> KernelRun:
    """Run an operator and its backward, and compare both with their references."""
    device, operators = torch.device(device_name), small_cases.calls()[name]
    runs, ok = "reference", True
    try:
        loaded = library.load()
        placed = [device_check.in_place(operator, device, REFERENCES[operator]) for operator in operators]
        rejected = [reason for operator in operators if (reason := device_check.why_not(operator, device))]
        if all(placed):
            runs = f"{loaded.kind} library"
            why = "its results are near those of its reference"
        elif loaded.kind == "reference":
            why = "no library is loaded"
        else:
            why = rejected[0] if rejected else f"the {loaded.kind} library has no kernel of it for this device"
        for operator in operators:
            small_cases.compare(operator, getattr(torch.ops.shardcomp, operator), REFERENCES[operator], device, name)
    except Exception as error:
        runs, ok, why = "nothing", False, f"{type(error).__name__}: {error}"
    return {"name": name, "device": device_name, "runs": runs, "ok": ok, "why": why}


def _try_attention(provider: str, device: str) -> KernelRun:
    """Run attention by one provider, forward and backward, and compare it with eager attention in float64."""
    ok = True
    try:
        draw = torch.Generator().manual_seed(0)
        heads = [torch.randn((1, n, 64, 64), generator=draw) for n in (4, 2, 2)]  # q, k, v
        results = []
        for provider_name, dtype in ((provider, torch.bfloat16), ("eager", torch.float64)):
            inputs = [tensor.to(device, dtype).requires_grad_() for tensor in heads]
            out = attention(*inputs, causal=True, provider=provider_name)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for tensor, exact in zip(*results, strict=True):
            torch.testing.assert_close(tensor.double(), exact, rtol=0.05, atol=0.02 * float(exact.detach().abs().max()))
        default = "what auto takes; " if provider == "sdpa" else ""
        why = f"{default}forward and backward are near those of float64"
    except Exception as error:
        ok, why = False, str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    return {"name": "attention", "device": device, "runs": provider, "ok": ok, "why": why}


def _try_embedding(device: str) -> KernelRun:
    """Run the split embedding, which consists of torch's own operators."""
    weight = torch.arange(32.0, device=device).view(8, 4).requires_grad_()
    ids = torch.tensor([5, 0], device=device)
    rows = vocab_embedding(weight, ids, -1, 8, Axis("tp", 1, 0))
    rows.sum().backward()
    ok = torch.equal(rows, weight[ids]) and weight.grad is not None and bool(weight.grad.sum() == 8)
    why = "it consists of torch's operators; called"
    return {"name": "embedding", "device": device, "runs": "torch", "ok": ok, "why": why}
