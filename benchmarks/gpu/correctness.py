"""Every fused operator on a device against float64 and against the bits that HuggingFace's modules give there."""

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
"""How much further from float64 than HuggingFace's modules an operator may be, each norm of a difference by itself."""
BITS = {"rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu"}
"""What has the bits of the model in 16 bits. A loss, which adds many numbers, is compared with float64 alone, and so is
everything in float32, where two exponentials of one number need not be the same."""
SHAPES = {
    "7b": (Shape(4096, 11008, 32, 32, 128, 32000), 256),
    "odd": (Shape(1027, 517, 5, 5, 34, 1013), 67),
    "tiny": (Shape(64, 48, 4, 2, 16, 257), 33),
}
"""Name -> sizes, and the tokens."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Check:
    """What was found out of one operator. bits: the least share of equal bits, of any result. further: by what factor it is
    further from float64 than HuggingFace's, at most, of any result or gradient."""

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
    found = Check(operator, shape, str(dtype).removeprefix("torch."), False)
    try:
        found.bits, found.further, found.why = check()
        found.ok = not found.why
    except Exception as error:
        found.why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found


def _run(call: Call, operands: list[Tensor], exact: bool = False) -> list[Tensor]:
    """Results and gradients. exact: nothing is rounded to less than float64, by a module neither."""
    given = [held.detach().double() if exact and held.is_floating_point() else held.detach() for held in operands]
    for held, operand in zip(given, operands, strict=True):
        held.requires_grad_(operand.requires_grad)
    if exact:
        with Widened():
            made = benchmark.results(call(*given))
    else:
        made = benchmark.results(call(*given))
    draw = torch.Generator(given[0].device).manual_seed(1)
    seeds = [torch.randn(out.shape, generator=draw, device=out.device, dtype=torch.float64) for out in made]
    seeds = [seed.to(operands[0].dtype).to(out.dtype) if out.dim() else seed.new_ones((), dtype=out.dtype)
             for seed, out in zip(seeds, made, strict=True)]  # fmt: skip
    return made + list(torch.autograd.grad(made, [held for held in given if held.requires_grad], seeds))


def _against(case: Case, dtype: torch.dtype) -> tuple[float | None, float, str]:
    """An operator beside HuggingFace's module, and both beside float64."""
    operands, (ours, theirs) = case.make(), (case.calls[name] for name in ("shardcomp", "HuggingFace"))
    assert not isinstance(ours, str) and not isinstance(theirs, str)
    made, expected, exact = _run(ours, operands), _run(theirs, operands), _run(theirs, operands, exact=True)
    results = len(made) - sum(held.requires_grad for held in operands)
    bits = None
    if case.operator in BITS and dtype != torch.float32:
        bits = min(equal_bits(a, b) for a, b in zip(made[:results], expected[:results], strict=True))
        if bits < EQUAL_BITS:
            return bits, _furthest(made, expected, exact, dtype), f"{bits:.4%} of the bits are those of HuggingFace"
    further = _furthest(made, expected, exact, dtype)
    return bits, further, "" if further <= FURTHER else f"{further:.2f} times as far from float64 as HuggingFace"


def _furthest(made: list[Tensor], expected: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> float:
    """The largest ratio of distances, beyond chance: the lengths of two vectors of n independent roundings differ by a share of
    1 / √n, of which three are granted. Where the other is nearer than the rounding of `dtype`, in which both compute, by luck,
    this takes its place; a loss in float32 adds many numbers, in an order that is nobody's."""
    ratios = []
    for ours, theirs, true in zip(made, expected, exact, strict=True):
        size = float(true.detach().norm())
        apart, allowed = (float((each.double() - true).detach().norm()) for each in (ours, theirs))
        luck = size * torch.finfo(dtype).eps * (4 if dtype == torch.float32 and not true.dim() else 0.5)
        chance = 1 + 3 / true.numel() ** 0.5 if true.numel() > 1 else 1
        ratios.append(apart / max(allowed, luck, 1e-300) / chance if apart == apart else float("inf"))
    return max(ratios)


MOST_GATES = 4
"""Of the bf16 numbers, those whose silu lies so near halfway between two of them that it takes more than float32 to tell them
apart."""


def _every_gate(device: torch.device) -> tuple[float, None, str]:
    """silu of every bf16, beside torch's."""
    gates = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(device)
    ones = torch.ones_like(gates)
    bits = equal_bits(kernels.swiglu(gates, ones, round_first=True), nn.functional.silu(gates) * ones)
    other = round((1 - bits) * gates.numel())
    return bits, None, "" if other <= MOST_GATES else f"{other} of all {gates.numel()} gates have other bits than in torch"


def _adamw(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    """Three steps with clipping, beside torch's AdamW on the same numbers in float32, and that in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (4097,), (3,), (128, 128), ()]
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    gradients = [[torch.randn(shape, generator=draw).to(dtype) for shape in shapes] for _ in range(3)]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def run(kind: Any, wide: torch.dtype, **more: Any) -> list[Tensor]:
        weights = [nn.Parameter(held.to(device, wide)) for held in start]
        optimizer = kind(weights, **options, **more)
        for some in gradients:
            for weight, gradient in zip(weights, some, strict=True):
                weight.grad = gradient.to(device, wide)
            optimizer.step()
        return [weight.detach() for weight in weights]

    ours, theirs = run(shardcomp.AdamW, torch.float32), run(torch.optim.AdamW, torch.float32, foreach=True)
    further = _furthest(ours, theirs, run(torch.optim.AdamW, torch.float64, foreach=True), torch.float32)
    return None, further, "" if further <= FURTHER else f"{further:.2f} times as far from float64 as torch.optim.AdamW"


def _grad_norm(device: torch.device, dtype: torch.dtype) -> tuple[None, float, str]:
    draw = torch.Generator().manual_seed(0)
    held = [torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1000, 1001), (33,), (1,), (4, 5, 6))]
    exact = sum(each.double().square().sum() for each in held)
    apart = abs(float((kernels.grad_norm(held).double() - exact) / exact))
    return None, apart / 1e-6, "" if apart <= 1e-6 else f"the square of the norm is off by {apart:.1e}"
