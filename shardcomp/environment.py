"""What this machine has: versions, devices, and what runs each fused operator on them, found out by running it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from shardcomp import __version__
from shardcomp.collectives import Axis
from shardcomp.errors import ShardError
from shardcomp.kernels import attention, library, vocab_embedding
from shardcomp.kernels.operators import REFERENCES
from shardcomp.kernels.providers import PROVIDERS


def environment() -> dict[str, Any]:
    """`versions` {package: version}, `devices` [{device, name, memory}], `kernels` [{name, device, runs, ok, why}]."""
    devices = _devices()
    names = [device["device"] for device in devices]
    kernels = [_compare(name, device) for device in names for name in _FUSED]
    kernels += [_attend(provider, device) for device in names for provider in PROVIDERS]
    kernels += [_embed(device) for device in names]
    return {"versions": versions(), "devices": devices, "kernels": kernels}


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


def _fused() -> dict[str, dict[str, tuple[Any, ...]]]:
    """Operator -> a small call of it and one of its backward: name -> arguments."""
    draw = torch.Generator().manual_seed(0)
    x, y, w, b = (torch.randn(shape, generator=draw) for shape in ((3, 5, 16), (3, 5, 16), (16,), (16,)))
    moment = torch.rand((3, 5, 1), generator=draw)
    labels, one = torch.tensor([3, 8, -100, 4, 2]), torch.tensor(1.0)
    rows = (x[0], labels, labels >= 0, 2)
    normal = (torch.stack((x[0].amax(1), torch.rand(5, generator=draw) + 1)), torch.rand(5, generator=draw))
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
        "cross_entropy": {"cross_entropy_statistics": rows, "cross_entropy_gradient": (*rows[:3], *normal, 2)},
        "linear_cross_entropy": {"cross_entropy_statistics": rows, "cross_entropy_gradient_": (*rows[:3], *normal, 2)},
        "adamw": {
            "adamw_": ([w], [], [b], [w / 9], [w * w], [one], one.double() / 9, 0.9, 0.95, 1e-8, 0.1, False, one / 3, None)
        },
        "grad_norm": {"grad_norm": ([x, w],)},
    }


_FUSED = _fused()


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


def _compare(name: str, device: str) -> dict[str, Any]:
    """Run an operator and its backward, and compare both with their references."""
    found = {"name": name, "device": device, "runs": "reference", "ok": True}
    try:
        loaded = library.load()
        if all(library.provides(each, device.partition(":")[0]) for each in _FUSED[name]):
            found["runs"] = f"{loaded.kind} library"
            found["why"] = f"its results are near those of its reference; {loaded.why}"
        elif loaded.kind == "reference":
            found["why"] = loaded.why
        else:
            found["why"] = f"the {loaded.kind} library has no kernel of it for this device"
        for each, arguments in _FUSED[name].items():
            results = []
            for run in (getattr(torch.ops.shardcomp, each), REFERENCES[each]):
                given = tree_map(lambda held: held.to(device, copy=True) if isinstance(held, Tensor) else held, arguments)
                results.append((run(*given), given))  # some write over what they are given
            torch.testing.assert_close(*map(_tensors, results), rtol=1e-4, atol=1e-5)
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
