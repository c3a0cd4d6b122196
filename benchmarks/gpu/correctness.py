"""Every fused operator on a device, compared with float64 and with the bits of HuggingFace's modules on that device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import benchmark
import shardcomp
from benchmark import Call, Case, Setting, Shape
from shardcomp import kernels
from shardcomp.fusion.equivalence import EQUAL_BITS, equal_bits
from shardcomp.ir.precision import Widened

FURTHER = 1.05
"""By what factor an operator may be further from float64 than HuggingFace's modules, in every result and gradient."""
BITS = {"rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu"}
"""The operators that have the model's own bits in 16 bits. A loss, which adds many numbers, is compared with float64 alone. So
is everything in float32, where two exponentials of the same number may differ."""
SHAPES = {
    "7b": (Shape(4096, 11008, 32, 32, 128, 32000), 256),
    "odd": (Shape(1027, 517, 5, 5, 34, 1013), 67),
    "tiny": (Shape(64, 48, 4, 2, 16, 257), 33),
}
"""Name -> sizes, and how many tokens."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Check:
    """The comparison of one operator.

    bits: the smallest share of equal bits among its results. further: the largest factor, among results and gradients, by which
    it is further from float64 than HuggingFace's module.
    """

    operator: str
    shape: str
    dtype: str
    ok: bool
    bits: float | None = None
    further: float | None = None
    why: str = ""


def checks(device: torch.device, shapes: tuple[str, ...] = tuple(SHAPES)) -> Iterator[Check]:
    """All operators at these shapes, in every dtype."""
    for name in shapes:
        shape, tokens = SHAPES[name]
        for dtype in DTYPES:
            setting = Setting(device, dtype, tokens, 0.0)
            torch.manual_seed(0)
            for case in benchmark.cases(name, setting, set(benchmark.OPERATORS) - {"adamw"}, shape):
                yield _guarded(case.operator, name, dtype, lambda case=case, dtype=dtype: _against(case, dtype))
    yield _guarded("swiglu", "gates", torch.bfloat16, lambda: _every_gate(device))
    for dtype in DTYPES:
        yield _guarded("adamw", "lists", dtype, lambda dtype=dtype: _adamw(device, dtype))
        yield _guarded("grad_norm", "lists", dtype, lambda dtype=dtype: _grad_norm(device, dtype))


def _guarded(operator: str, shape: str, dtype: torch.dtype, check: Any) -> Check:
    result = Check(operator, shape, str(dtype).removeprefix("torch."), False)
    try:
        result.bits, result.further, result.why = check()
        result.ok = not result.why
    except Exception as error:
        result.why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return result


def _run(call: Call, operands: list[Tensor], exact: bool = False) -> list[Tensor]:
    """Results and gradients. exact: everything is computed in float64, also inside a module."""
    inputs = [tensor.detach().double() if exact and tensor.is_floating_point() else tensor.detach() for tensor in operands]
    for tensor, operand in zip(inputs, operands, strict=True):
        tensor.requires_grad_(operand.requires_grad)
    if exact:
        with Widened():
            results = benchmark.results(call(*inputs))
    else:
        results = benchmark.results(call(*inputs))
    draw = torch.Generator(inputs[0].device).manual_seed(1)
    seeds = [torch.randn(out.shape, generator=draw, device=out.device, dtype=torch.float64) for out in results]
    seeds = [seed.to(operands[0].dtype).to(out.dtype) if out.dim() else seed.new_ones((), dtype=out.dtype)
             for seed, out in zip(seeds, results, strict=True)]  # fmt: skip
    return results + list(torch.autograd.grad(results, [tensor for tensor in inputs if tensor.requires_grad], seeds))


def _against(case: Case, dtype: torch.dtype) -> tuple[float | None, float, str]:
    """Compare an operator with HuggingFace's module, and both with float64."""
    operands, (ours, theirs) = case.make(), (case.calls[name] for name in ("shardcomp", "HuggingFace"))
    assert not isinstance(ours, str) and not isinstance(theirs, str)
    actual, expected, exact = _run(ours, operands), _run(theirs, operands), _run(theirs, operands, exact=True)
    results = len(actual) - sum(operand.requires_grad for operand in operands)
    bits = None
    if case.operator in BITS and dtype != torch.float32:
        bits = min(equal_bits(a, b) for a, b in zip(actual[:results], expected[:results], strict=True))
        if bits < EQUAL_BITS:
            return bits, _furthest(actual, expected, exact, dtype), f"{bits:.4%} of the bits are those of HuggingFace"
    further = _furthest(actual, expected, exact, dtype)
    return bits, further, "" if further <= FURTHER else f"{further:.2f} times as far from float64 as HuggingFace"


def _furthest(actual: list[Tensor], expected: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> float:
    """The largest ratio of the distances from float64, beyond what chance explains.

    The norms of n independent roundings differ by a share of 1 / √n: three times that is allowed. HuggingFace's result may be
    closer than the rounding of `dtype` by luck: then that rounding counts as its distance. For a loss in float32, which adds
    many numbers in some order, several roundings do.
    """
    ratios = []
    for ours, theirs, true in zip(actual, expected, exact, strict=True):
        size = float(true.detach().norm())
        distance, allowed = (float((result.double() - true).detach().norm()) for result in (ours, theirs))
        luck = size * torch.finfo(dtype).eps * (4 if dtype == torch.float32 and not true.dim() else 0.5)
        chance = 1 + 3 / true.numel() ** 0.5 if true.numel() > 1 else 1
        ratios.append(distance / max(allowed, luck, 1e-300) / chance if distance == distance else float("inf"))
    return max(ratios)


MOST_GATES = 4
"""How many bf16 numbers may differ: their silu is so close to halfway between two bf16 numbers that float32 cannot decide."""


def _every_gate(device: torch.device) -> tuple[float, None, str]:
    """Compare silu of every bf16 number with torch's."""
    gates = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(device)
    ones = torch.ones_like(gates)
    bits = equal_bits(kernels.swiglu(gates, ones, round_first=True), nn.functional.silu(gates) * ones)
    other = round((1 - bits) * gates.numel())
    return bits, None, "" if other <= MOST_GATES else f"{other} of all {gates.numel()} gates have other bits than in torch"


def _adamw(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    """Compare three steps of AdamW with torch's in float32, and both with torch's in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (4097,), (3,), (128, 128), ()]
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    gradients = [[torch.randn(shape, generator=draw).to(dtype) for shape in shapes] for _ in range(3)]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def run(kind: Any, wide: torch.dtype, **more: Any) -> list[Tensor]:
        weights = [nn.Parameter(tensor.to(device, wide)) for tensor in start]
        optimizer = kind(weights, **options, **more)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.to(device, wide)
            optimizer.step()
        return [weight.detach() for weight in weights]

    ours, theirs = run(shardcomp.AdamW, torch.float32), run(torch.optim.AdamW, torch.float32, foreach=True)
    further = _furthest(ours, theirs, run(torch.optim.AdamW, torch.float64, foreach=True), torch.float32)
    return None, further, "" if further <= FURTHER else f"{further:.2f} times as far from float64 as torch.optim.AdamW"


def _grad_norm(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1000, 1001), (33,), (1,), (4, 5, 6))]
    exact = sum(gradient.double().square().sum() for gradient in gradients)
    deviation = abs(float((kernels.grad_norm(gradients).double() - exact) / exact))
    return None, deviation / 1e-6, "" if deviation <= 1e-6 else f"the square of the norm is off by {deviation:.1e}"
