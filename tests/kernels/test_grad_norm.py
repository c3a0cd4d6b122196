"""The square of the norm of many gradients, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from shardcomp.kernels import grad_norm

SHAPES = [(67, 31), (0, 3), (), (4099,)]


def draw(dtype: torch.dtype) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_square_is_that_of_a_float64_sum(dtype: torch.dtype) -> None:
    gradients = draw(dtype)
    gradients[0] = gradients[0].T
    found = grad_norm(gradients)
    exact = sum((each.double().square().sum() for each in gradients), torch.zeros((), dtype=torch.float64))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found.shape == ()
    torch.testing.assert_close(found.double(), exact, rtol=16 * torch.finfo(found.dtype).eps, atol=0)


def test_gradients_of_several_dtypes_are_added_in_the_widest() -> None:
    gradients = [torch.full((3,), 3.0, dtype=torch.bfloat16), torch.full((2,), 0.1, dtype=torch.float64)]
    torch.testing.assert_close(grad_norm(gradients), torch.tensor(27.02, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_element_that_is_not_finite_shows(bad: float) -> None:
    gradients = draw(torch.bfloat16)
    gradients[3][-1] = bad
    assert not grad_norm(gradients).isfinite()


def test_large_narrow_gradients_do_not_overflow() -> None:
    assert grad_norm([torch.full((2,), 60000.0, dtype=torch.float16)]) == 7.2e9


def test_the_operator_is_well_formed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(torch.ops.shardcomp.grad_norm.default, (draw(dtype),))


def test_no_gradients_at_all_are_refused() -> None:
    assert grad_norm([torch.zeros(0)]) == 0
    with pytest.raises(ValueError, match="no gradients"):
        grad_norm([])
