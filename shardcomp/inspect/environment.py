"""What this machine has: versions, devices, and what runs each fused operator on them, found out by running it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from shardcomp import __version__
from shardcomp.errors import ShardError
from shardcomp.ir.collectives import Axis
from shardcomp.kernels import attention, device_check, library, small_cases, vocab_embedding
from shardcomp.kernels.attention_providers import PROVIDERS
from shardcomp.kernels.register import REFERENCES


def environment() -> dict[str, Any]:
    """`versions` {package: version}, `library` {kind, path, why}, `devices` [{device, name, memory}], `kernels` [{name, device,
    runs, ok, why}]."""
    devices = _devices()
    names = [device["device"] for device in devices]
    kernels = [_compare(name, device) for device in names for name in small_cases.calls()]
    kernels += [_attend(provider, device) for device in names for provider in PROVIDERS]
    kernels += [_embed(device) for device in names]
    return {"versions": versions(), "library": _library(), "devices": devices, "kernels": kernels}


def _library() -> dict[str, Any]:
    """The library of kernels; without one that was asked for by name, what speaks against it."""
    try:
        loaded = library.load()
    except ShardError as error:
        return {"kind": "none", "path": None, "why": str(error)}
    return {"kind": loaded.kind, "path": str(loaded.path) if loaded.path else None, "why": loaded.why}


def versions() -> dict[str, str]:
    """Of what a run depends on: package -> version, or that it is not installed."""
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


def _compare(name: str, device: str) -> dict[str, Any]:
    """Run an operator and its backward, and compare both with their references."""
    found = {"name": name, "device": device, "runs": "reference", "ok": True}
    place, operators = torch.device(device), small_cases.calls()[name]
    try:
        loaded = library.load()
        runs = [device_check.in_place(each, place, REFERENCES[each]) for each in operators]
        rejected = [why for each in operators if (why := device_check.why_not(each, place))]
        if all(runs):
            found["runs"] = f"{loaded.kind} library"
            found["why"] = "its results are near those of its reference"
        elif loaded.kind == "reference":
            found["why"] = "no library is loaded"
        else:
            found["why"] = rejected[0] if rejected else f"the {loaded.kind} library has no kernel of it for this device"
        for each in operators:
            small_cases.compare(each, getattr(torch.ops.shardcomp, each), REFERENCES[each], place, name)
    except Exception as error:
        found |= {"runs": "nothing", "ok": False, "why": f"{type(error).__name__}: {error}"}
    return found


def _attend(provider: str, device: str) -> dict[str, Any]:
    """Run attention by one provider, forward and backward, and compare it with that written out."""
    found = {"name": "attention", "device": device, "runs": provider, "ok": True}
    try:
        draw = torch.Generator().manual_seed(0)
        heads = [torch.randn((1, n, 64, 64), generator=draw) for n in (4, 2, 2)]
        made = []
        for which, dtype in ((provider, torch.bfloat16), ("eager", torch.float64)):
            given = [held.to(device, dtype).requires_grad_() for held in heads]
            out = attention(*given, causal=True, provider=which)
            made.append([out, *torch.autograd.grad(out.square().sum(), given)])
        for one, exact in zip(*made, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=0.05, atol=0.02 * float(exact.detach().abs().max()))
        taken = "what auto takes; " if provider == "sdpa" else ""
        found["why"] = f"{taken}forward and backward are near those of float64"
    except Exception as error:
        found |= {"ok": False, "why": str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"}
    return found


def _embed(device: str) -> dict[str, Any]:
    """Run the split embedding, which torch's own operators make up."""
    weight = torch.arange(32.0, device=device).view(8, 4).requires_grad_()
    ids = torch.tensor([5, 0], device=device)
    made = vocab_embedding(weight, ids, -1, 8, Axis("tp", 1, 0))
    made.sum().backward()
    ok = torch.equal(made, weight[ids]) and weight.grad is not None and bool(weight.grad.sum() == 8)
    return {"name": "embedding", "device": device, "runs": "torch", "ok": ok, "why": "it is made of torch's operators; called"}
