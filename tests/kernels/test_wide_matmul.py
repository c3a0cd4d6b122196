"""Products of narrow factors: summed in the wide dtype and rounded once, whichever library multiplies, whatever the strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from shardcomp.kernels import wide_matmul
from shardcomp.kernels.wide_matmul import add_product, linear, matmul, product
from shardcomp.torch_private import FakeTensorMode

SIZES = [(1, 1, 1), (3, 5, 2), (7, 1, 4), (16, 33, 8), (64, 96, 130)]
VIEWS = ["plain", "transposed", "columns", "rows", "every other column"]
NEEDS_BLAS = pytest.mark.skipif(wide_matmul._blas() is None, reason="this torch ships no such BLAS")


def drawn(rows: int, columns: int, view: str) -> Tensor:
    """bf16 [rows, columns] with such strides."""
    draw = torch.Generator().manual_seed(rows * columns)
    match view:
        case "transposed":
            return torch.randn(columns, rows, generator=draw).bfloat16().t()
        case "columns":
            return torch.randn(rows, columns + 3, generator=draw).bfloat16()[:, 2:-1]
        case "rows":
            return torch.randn(rows + 2, columns, generator=draw).bfloat16()[1:-1]
        case "every other column":
            return torch.randn(rows, 2 * columns, generator=draw).bfloat16()[:, ::2]
    return torch.randn(rows, columns, generator=draw).bfloat16()


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


@pytest.fixture(params=[True, False], ids=["blas", "widened"])
def blas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether BLAS multiplies."""
    if not request.param:
        monkeypatch.setattr(wide_matmul, "_blas", lambda: None)
    elif wide_matmul._blas() is None:
        pytest.skip("this torch ships no such BLAS")
    return bool(request.param)


@pytest.mark.parametrize("left", VIEWS)
@pytest.mark.parametrize("right", VIEWS)
def test_the_result_is_as_exact_as_float32(left: str, right: str, blas: bool) -> None:
    for m, k, n in SIZES:
        a, b = drawn(m, k, left), drawn(k, n, right)
        torch.testing.assert_close(product(a, b, torch.float32).double(), exact(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", ["plain", "columns", "transposed", "every other column"])
def test_products_are_added_where_the_total_is(view: str, blas: bool) -> None:
    for m, k, n in SIZES:
        total = drawn(m, n, view).float() if view == "plain" else torch.ones(m, 2 * n)[:, ::2]
        total = {"columns": torch.ones(m, n + 2)[:, 1:-1], "transposed": torch.ones(n, m).t()}.get(view, total)
        before = total.double()
        a, b = drawn(m, k, "transposed"), drawn(k, n, "plain")
        pointer = total.data_ptr()
        add_product(total, a, b)
        assert total.data_ptr() == pointer
        torch.testing.assert_close(total.double(), before + exact(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slow", [False, True])
def test_a_narrow_result_is_rounded_once(slow: bool, blas: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_matmul, "_BF16_IS_SLOW", slow)
    x, weight, bias = drawn(24, 40, "plain"), drawn(16, 40, "plain"), drawn(1, 16, "plain")[0]
    rounded = exact(x, weight.t()).bfloat16()
    out = torch.empty_like(rounded)
    assert matmul(x, weight.t(), out=out) is out
    for result in (matmul(x, weight.t()), linear(x, weight), linear(x.view(2, 12, 40), weight).view(24, 16), out):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, rounded, rtol=2**-7, atol=2**-9)
    with_bias = (exact(x, weight.t()) + bias).bfloat16()
    torch.testing.assert_close(linear(x, weight, bias), with_bias, rtol=2**-7, atol=2**-7)
    if slow:
        assert torch.equal(matmul(x, weight.t()), product(x, weight.t(), torch.float32).bfloat16())


def test_an_empty_sum_is_zero(blas: bool) -> None:
    empty = torch.ones(3, 0, dtype=torch.bfloat16)
    assert torch.equal(product(empty, empty.t(), torch.float32), torch.zeros(3, 3))
    total = torch.ones(3, 3)
    add_product(total, empty, empty.t())
    assert torch.equal(total, torch.ones(3, 3))
    assert product(empty.t(), torch.ones(3, 2, dtype=torch.bfloat16), torch.float32).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_are_multiplied_by_torch(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 6).to(dtype), torch.randn(6, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(product(a, b, wide), a.to(wide) @ b.to(wide))
    assert torch.equal(matmul(a, b), a @ b)
    assert torch.equal(linear(a, b.t().contiguous()), functional.linear(a, b.t().contiguous()))


@NEEDS_BLAS
def test_what_has_no_memory_or_a_gradient_is_left_to_torch() -> None:
    a, b = drawn(4, 6, "plain"), drawn(6, 3, "plain")
    with FakeTensorMode() as mode:
        assert product(mode.from_tensor(a), mode.from_tensor(b), torch.float32).shape == (4, 3)
    on_meta = product(a.to("meta"), b.to("meta"), torch.float32)
    assert on_meta.shape == (4, 3) and on_meta.dtype == torch.float32
    product(a.requires_grad_(), b, torch.float32).sum().backward()
    assert a.grad is not None and torch.equal(a.grad, b.sum(1).expand(4, 6))


@NEEDS_BLAS
def test_it_compiles_without_a_break() -> None:
    a, b = drawn(8, 6, "plain"), drawn(6, 3, "plain")
    compiled = torch.compile(lambda a, b: (matmul(a, b), product(a, b, torch.float32)), backend="aot_eager", fullgraph=True)
    for result, expected in zip(compiled(a, b), (matmul(a, b), product(a, b, torch.float32)), strict=True):
        torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-7)


@NEEDS_BLAS
def test_a_counter_of_flops_sees_every_product() -> None:
    a, b = drawn(8, 6, "plain"), drawn(6, 3, "plain")
    with FlopCounterMode(display=False) as counter:
        product(a, b, torch.float32)
    assert counter.get_total_flops() == 2 * 8 * 6 * 3
