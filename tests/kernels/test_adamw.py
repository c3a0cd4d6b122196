"""The AdamW operator against a float64 Adam, step by step, in every combination of dtypes; and what it refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from shardcomp.kernels import adamw_

ops = torch.ops.shardcomp
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3, 5), (0, 4), (), (131,), (17, 1)]
STEPS = 25
WEIGHTS = [torch.float32, torch.float64]
GRADIENTS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COPIES = [None, torch.bfloat16, torch.float16]


def draw(dtype: torch.dtype, seed: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in SHAPES]


def rate(lr: float = 0.05) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


class Lists:
    """What the operator takes for `SHAPES`."""

    def __init__(self, weight: torch.dtype = torch.float32, copy: torch.dtype | None = None) -> None:
        self.weights = draw(weight, 0)
        self.copies = [] if copy is None else [each.to(copy) for each in self.weights]
        self.exp_avgs = [torch.zeros_like(each) for each in self.weights]
        self.exp_avg_sqs = [torch.zeros_like(each) for each in self.weights]
        self.steps = [torch.zeros(()) for _ in self.weights]

    def changed(self) -> list[Tensor]:
        return [*self.weights, *self.copies, *self.exp_avgs, *self.exp_avg_sqs, *self.steps]

    def step(self, gradients: list[Tensor], lr: float = 0.05, **options: Any) -> None:
        moments = (self.exp_avgs, self.exp_avg_sqs)
        adamw_(self.weights, self.copies, gradients, *moments, self.steps, rate(lr), **{**OPTIONS, **options})

    def saved(self) -> list[Tensor]:
        return [each.clone() for each in self.changed()]


class Exact:
    """Adam with decoupled weight decay, in float64, as its paper has it."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = [each.double() for each in weights]
        self.m = [torch.zeros_like(each) for each in self.weights]
        self.v = [torch.zeros_like(each) for each in self.weights]
        self.t = 0

    def step(self, gradients: list[Tensor], lr: float = 0.05, maximize: bool = False, scale: float = 1.0) -> None:
        (b1, b2), eps, decay = OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"]
        self.t += 1
        for i, gradient in enumerate(gradients):
            g = gradient.double() * scale * (-1 if maximize else 1)
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            m, v = self.m[i] / (1 - b1**self.t), self.v[i] / (1 - b2**self.t)
            self.weights[i] = self.weights[i] - lr * (m / (v.sqrt() + eps) + decay * self.weights[i])


@pytest.mark.parametrize(("weight", "gradient", "copy"), list(product(WEIGHTS, GRADIENTS, COPIES)))
def test_many_steps_are_those_of_a_float64_adam(weight: torch.dtype, gradient: torch.dtype, copy: torch.dtype | None) -> None:
    held, exact = Lists(weight, copy), Exact(draw(weight, 0))
    precision = torch.finfo(weight).eps
    for step in range(STEPS):
        gradients = draw(gradient, step + 1)
        options: dict[str, Any] = {"lr": 0.05 / (step + 1), "maximize": step % 3 == 2}
        held.step(gradients, scale=torch.tensor(0.25, dtype=weight), **options)
        exact.step(gradients, scale=0.25, **options)
        for mine, theirs in (
            (held.weights, exact.weights),
            (held.exp_avgs, exact.m),
            (held.exp_avg_sqs, exact.v),
        ):
            for found, wanted in zip(mine, theirs, strict=True):
                # Each step rounds each number a few times.
                torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2 * precision * (step + 1))
        for master, narrow in zip(held.weights, held.copies, strict=False):
            assert torch.equal(narrow, master.to(narrow.dtype))
    assert all(float(count) == STEPS for count in held.steps)


def test_gradients_and_what_is_read_are_left_as_they_were() -> None:
    held, gradients, scale = Lists(), draw(torch.bfloat16, 1), torch.tensor(0.5)
    before = [each.clone() for each in gradients]
    held.step(gradients, scale=scale, found_inf=torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients, strict=True)) and scale == 0.5


@pytest.mark.parametrize("copy", COPIES)
def test_a_step_that_is_skipped_changes_no_bit(copy: torch.dtype | None) -> None:
    held = Lists(copy=copy)
    held.step(draw(torch.float32, 1))
    for narrow in held.copies:
        narrow.mul_(2)  # not even what is no rounding of its weight
    before = held.saved()
    gradients = draw(torch.float32, 2)
    gradients[0][1, 2] = float("nan")
    held.step(gradients, found_inf=torch.tensor(1.0), scale=torch.tensor(float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(before, held.changed(), strict=True))
    held.step(gradients, found_inf=torch.tensor(0.0))
    assert held.weights[0].isnan().sum() == 1 and not held.weights[3].isnan().any() and held.steps[0] == 2


def test_every_parameter_has_its_own_number_of_steps() -> None:
    held, exact, late = Lists(torch.float64), Exact(draw(torch.float64, 0)), Lists(torch.float64)
    for step in range(3):
        held.step(draw(torch.float64, step))
        exact.step(draw(torch.float64, step))
    for each in ("weights", "exp_avgs", "exp_avg_sqs", "steps"):
        getattr(late, each)[1:] = getattr(held, each)[1:]
    late.step(draw(torch.float64, 3))
    exact.step(draw(torch.float64, 3))
    first = Exact(draw(torch.float64, 0))
    first.step(draw(torch.float64, 3))
    torch.testing.assert_close(late.weights[0], first.weights[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(late.weights[3], exact.weights[3], rtol=1e-14, atol=1e-14)


def test_tensors_of_other_strides_are_updated_in_place() -> None:
    plain, turned = Lists(torch.float64), Lists(torch.float64)
    turned.weights[0] = turned.weights[0].T.contiguous().T
    gradients = draw(torch.float64, 1)
    plain.step(gradients)
    turned.step([gradients[0].T.contiguous().T, *gradients[1:]])
    assert torch.equal(plain.weights[0], turned.weights[0]) and turned.weights[0].stride() == (1, 3)


def test_the_operator_is_well_formed() -> None:
    for copy, scale in product((None, torch.bfloat16), (None, torch.tensor(0.5))):
        held = Lists(copy=copy)
        lists = (held.weights, held.copies, draw(torch.bfloat16, 1), held.exp_avgs, held.exp_avg_sqs, held.steps)
        opcheck(ops.adamw_.default, (*lists, rate(), 0.9, 0.95, 1e-8, 0.1, False, scale, scale))


def test_lists_that_do_not_fit_together_are_refused() -> None:
    held = Lists()
    with pytest.raises(ValueError, match=r"lists of one length are needed, but there are .*'gradients': 4"):
        held.step(draw(torch.float32, 1)[1:])
    gradients = draw(torch.float32, 1)
    with pytest.raises(ValueError, match=r"gradients\[0\] is torch.float32 \(131,\) on cpu, not .* \(3, 5\) on cpu"):
        held.step(gradients[3:4] + gradients[1:])
    with pytest.raises(ValueError, match=r"gradients\[0\] is torch.int64"):
        held.step([gradients[0].long(), *gradients[1:]])
    held.steps[2] = torch.zeros((), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"steps\[2\] is torch.int64 \(\) on cpu, not torch.float32 \(\) on cpu"):
        held.step(gradients)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16; give float32 ones, and these as copies"):
        Lists(torch.bfloat16).step(gradients)
    adamw_([], [], [], [], [], [], rate(), **OPTIONS)
