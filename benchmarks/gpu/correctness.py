"""Compare every fused operator on a device with float64, and with the bits of HuggingFace's modules on that device."""

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
"""The largest factor by which a result or gradient may be further from float64 than that of HuggingFace's module."""
BITS = {"rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu"}
"""The operators whose results have the bits of HuggingFace's modules in bf16 and fp16.

The losses are compared with float64 alone, since they add many numbers in some order. So is everything in float32: there two
implementations of the exponential may differ in the last bit."""
SHAPES = {
    "7b": (Shape(4096, 11008, 32, 32, 128, 32000), 256),
    "odd": (Shape(1027, 517, 5, 5, 34, 1013), 67),
    "tiny": (Shape(64, 48, 4, 2, 16, 257), 33),
}
"""Name -> (sizes of the model, number of tokens). No size of `odd` is a multiple of a vector's or a warp's width."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Check:
    """The comparison of one operator.

    bits: the smallest share of equal numbers among its results. further: the largest factor, among results and gradients, by
    which it is further from float64 than HuggingFace's module. why: what is wrong, "" if nothing is.
    """

    operator: str
    shape: str
    dtype: str
    ok: bool
    bits: float | None = None
    further: float | None = None
    why: str = ""


def checks(device: torch.device, shapes: tuple[str, ...] = tuple(SHAPES)) -> Iterator[Check]:
    """Yield a comparison of every operator at these shapes, in every dtype."""
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
    """Run one comparison. An exception becomes its `why`, so that the other comparisons still run."""
    result = Check(operator, shape, str(dtype).removeprefix("torch."), False)
    try:
        result.bits, result.further, result.why = check()
        result.ok = not result.why
    except Exception as error:
        result.why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return result


def _run(call: Call, operands: list[Tensor], exact: bool = False) -> list[Tensor]:
    """The results of a call, and the gradients of its operands. exact: compute in float64, also inside a module that casts."""
    inputs = [tensor.detach().double() if exact and tensor.is_floating_point() else tensor.detach() for tensor in operands]
    for tensor, operand in zip(inputs, operands, strict=True):
        tensor.requires_grad_(operand.requires_grad)
    if exact:
        with Widened():
            results = benchmark.results(call(*inputs))
    else:
        results = benchmark.results(call(*inputs))
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    # Every run has the same output gradients. They are drawn in float64, and always rounded to the operands' dtype.
    drawn = [torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float64) for out in results]
    gradients = [grad.to(operands[0].dtype).to(out.dtype) if out.dim() else grad.new_ones((), dtype=out.dtype)
                 for grad, out in zip(drawn, results, strict=True)]  # fmt: skip
    return results + list(torch.autograd.grad(results, [tensor for tensor in inputs if tensor.requires_grad], gradients))


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
    """The largest ratio of two distances from float64, ours over HuggingFace's, less what chance explains.

    The norms of n independent roundings differ by a share of about 1 / √n, so three times that share is allowed. By luck,
    HuggingFace may be closer to float64 than one rounding of `dtype`. Then half a rounding counts as its distance. A loss in
    float32 adds many numbers, so four roundings count there.
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
"""How many bf16 numbers may have another silu than in torch. Their silu is so close to halfway between two bf16 numbers that
float32 cannot decide."""


def _every_gate(device: torch.device) -> tuple[float, None, str]:
    """Compare silu of every bf16 number with torch's."""
    gates = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(device)
    ones = torch.ones_like(gates)
    bits = equal_bits(kernels.swiglu(gates, ones, round_first=True), nn.functional.silu(gates) * ones)
    differing = round((1 - bits) * gates.numel())
    why = f"{differing} of all {gates.numel()} gates have other bits than in torch"
    return bits, None, "" if differing <= MOST_GATES else why


def _adamw(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    """Compare three steps of AdamW with torch's in float32, and both with torch's in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (4097,), (3,), (128, 128), ()]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(3)]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def run(optimizer_class: Any, dtype: torch.dtype, **more_options: Any) -> list[Tensor]:
        weights = [nn.Parameter(tensor.to(device, dtype)) for tensor in start]
        optimizer = optimizer_class(weights, **options, **more_options)
        for step_gradients in gradients:
            for weight, gradient in zip(weights, step_gradients, strict=True):
                weight.grad = gradient.to(device, dtype)
            optimizer.step()
        return [weight.detach() for weight in weights]

    ours, theirs = run(shardcomp.AdamW, torch.float32), run(torch.optim.AdamW, torch.float32, foreach=True)
    further = _furthest(ours, theirs, run(torch.optim.AdamW, torch.float64, foreach=True), torch.float32)
    return None, further, "" if further <= FURTHER else f"{further:.2f} times as far from float64 as torch.optim.AdamW"


def _grad_norm(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    """Compare the squared norm of a list of gradients with float64."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(device, dtype) for shape in ((1000, 1001), (33,), (1,), (4, 5, 6))]
    exact = sum(gradient.double().square().sum() for gradient in gradients)
    deviation = abs(float((kernels.grad_norm(gradients).double() - exact) / exact))
    return None, deviation / 1e-6, "" if deviation <= 1e-6 else f"the square of the norm is off by {deviation:.1e}"
