"""The library's kernels against the operators' references: dtypes, sizes, strides, threads, and what is not finite."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from shardcomp.errors import KernelError
from shardcomp.kernels import library
from shardcomp.kernels.register import REFERENCES

pytestmark = pytest.mark.skipif(library.load().kind == "reference", reason="there is no library")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [1, 2, 3, 7, 8, 9, 17, 31, 33, 64, 127, 260, 1027]
EPS = 1e-5
Calls = dict[str, tuple[Any, ...]]
SPACE = "shardcomp"
"""The namespace of the operators; `emulated.py` names another one."""


def operator(name: str) -> Any:
    return getattr(getattr(torch.ops, SPACE), name)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    actual = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return actual.to(dtype)


def calls(dtype: torch.dtype, h: int, rows: tuple[int, ...] = (3, 5), other: torch.dtype | None = None) -> Calls:
    """Every operator in every variant. other: the dtype of weights and tables."""
    other = other or dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, y, z = (draw(*rows, h, dtype=dtype, seed=i) for i in range(3))
    w, b = draw(h, dtype=other, seed=3), draw(h, dtype=other, seed=4)
    moments = draw(*rows, 1, seed=5).to(wide), draw(*rows, 1, seed=6).abs().to(wide)
    found: Calls = {}
    for weight in (w, None):
        for offset, first in ((0.0, False), (0.0, True), (1.0, False), (1.0, True)):
            form = f"{'plain' if weight is None else 'weighted'} {offset} {first}"
            found[f"rms_norm {form}"] = (x, weight, EPS, offset, first)
            found[f"add_rms_norm {form}"] = (x, y, weight, EPS, offset, first)
        for added in (z, None):
            found[f"rms_norm_bwd {added is None} {weight is None}"] = (y, added, x, weight, moments[1], 1.0)
        for bias in (b, None):
            for stepwise in (True, False) if other == dtype else (True,):
                found[f"layer_norm {weight is None} {bias is None} {stepwise}"] = (x, weight, bias, EPS, stepwise)
            found[f"layer_norm_bwd {weight is None} {bias is None}"] = (y, x, weight, bias, *moments)
    for activation in ("silu", "gelu", "gelu_tanh"):
        for first in (True, False):
            found[f"gated {activation} {first}"] = (x, y, activation, first)
        found[f"gated_bwd {activation}"] = (z, x, y, activation)
    for interleaved in (False, True):
        size = h - h % 2 if interleaved else h
        for turned in {size, size // 4 * 2} - {0, 1}:
            tables = [draw(*rows[-1:], turned, dtype=other, seed=i) for i in (7, 8)]
            form = f"{interleaved} {turned}"
            for each in (True, False):
                found[f"rotary {form} {each}"] = (x, y, *tables, interleaved, each)
            found[f"rotary_bwd {form}"] = (x, y, *tables, interleaved)
    logits = x.reshape(math.prod(rows), h)
    labels, first, normaliser, scale = *tokens(len(logits), h), draw(len(logits), dtype=other, seed=9)
    normaliser = normaliser.to(wide)
    found["cross_entropy_statistics"] = (logits, *labels, first)
    found["cross_entropy_gradient"] = (logits, *labels, normaliser, scale, first)
    found["cross_entropy_gradient_"] = (logits, *labels, normaliser, scale, first)
    return found | calls_of_lists(dtype, [(*rows, h), (h,), (0, h), (), (2, h)], other)


def calls_of_lists(dtype: torch.dtype, shapes: list[tuple[int, ...]], other: torch.dtype) -> Calls:
    """The operators on lists of tensors. other: the dtype of copies where it is a narrow one."""
    weight = torch.promote_types(dtype, torch.float32)
    narrow = other if other.itemsize == 2 else torch.bfloat16
    gradients = [draw(*shape, dtype=dtype, seed=1) for shape in shapes]
    weights, copies = ([draw(*shape, dtype=each, seed=2) for shape in shapes] for each in (weight, narrow))
    first = [draw(*shape, dtype=weight, seed=3) for shape in shapes]
    second = [draw(*shape, dtype=weight, seed=4).square() for shape in shapes]
    steps = [torch.tensor(float(at)) for at in range(len(shapes))]
    rate, zero = torch.tensor(0.01, dtype=torch.float64), torch.zeros(1)
    found: Calls = {"grad_norm": (gradients,)}
    for scale in (torch.tensor(0.37, dtype=weight), None):
        for beta1, copied, maximize, skips in (
            (0.9, True, False, None),
            (0.3, False, True, zero),
            (0.5, True, True, zero),
            (0.9, True, True, zero + 1),
        ):
            form = f"{scale is None} {beta1} {copied} {maximize} {skips}"
            lists = (weights, copies if copied else [], gradients, first, second, steps)
            found[f"adamw_ {form}"] = (*lists, rate, beta1, 0.95, 1e-8, 0.1, maximize, scale, skips)
    return found


def tokens(count: int, columns: int) -> tuple[tuple[Tensor, Tensor], int, Tensor]:
    """Labels before, among and behind some columns, and whether they count; the first column's label; a normaliser."""
    labels = torch.randint(-2, columns + 2, (count,), generator=torch.Generator().manual_seed(count)) + 100
    normaliser = torch.stack((draw(count, seed=10), draw(count, seed=11).abs() + 1))
    return (labels, torch.arange(count) % 4 != 1), 100, normaliser


def results(name: str, arguments: tuple[Any, ...], reference: bool = False) -> list[Tensor]:
    """What an operator returns, and then what it writes over, of copies of its arguments."""
    plain = name.partition(" ")[0]
    run = operator(plain)
    written = [each.alias_info is not None and each.alias_info.is_write for each in run.default._schema.arguments]
    inputs = [changed(fresh, held) if over else held for held, over in zip(arguments, written, strict=True)]
    actual = (REFERENCES[plain] if reference else run)(*inputs)
    found = list(actual) if isinstance(actual, tuple) else [] if actual is None else [actual]
    return found + [each for held, over in zip(inputs, written, strict=True) if over for each in tensors(held)]


def tensors(argument: Any) -> list[Tensor]:
    held = argument if isinstance(argument, list) else [argument]
    return [each for each in held if isinstance(each, Tensor)]


def changed(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """An argument, with another tensor in place of each that there is in it."""
    if isinstance(argument, list):
        return [changed(change, each) for each in argument]
    return change(argument) if isinstance(argument, Tensor) else argument


def fresh(x: Tensor) -> Tensor:
    """A copy with the strides of `x`, but where its elements lie over each other."""
    if 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def agree(name: str, arguments: tuple[Any, ...], ulps: float = 2) -> None:
    """The library's results are the reference's, but for the last bits."""
    actual, expected = (results(name, arguments, reference) for reference in (False, True))
    if name == "grad_norm":  # in float32 the reference itself has the errors of a long sum
        [exact] = results(name, (changed(Tensor.double, arguments[0]),), reference=True)
        expected = [exact.to(expected[0].dtype)]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride(), name
        wide = torch.promote_types(tensors(arguments[0])[0].dtype, torch.float32)
        eps = max(torch.finfo(dtype).eps for dtype in (a.dtype, wide))
        largest = float(b.abs().nan_to_num(0, 0, 0).amax()) if b.numel() else 0.0
        # Sums of many numbers, in another order: what is left where they cancel has the error of the largest.
        allowed = 1e-6 if eps > 1e-8 else 1e-14
        torch.testing.assert_close(a, b, rtol=ulps * eps, atol=largest * allowed, equal_nan=True, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("h", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_reference(dtype: torch.dtype, h: int) -> None:
    for name, arguments in calls(dtype, h).items():
        agree(name, arguments)


@pytest.mark.parametrize("rows", [(), (0,), (0, 3), (1,), (70, 3), (2, 3, 2, 5)])
def test_any_number_of_rows_may_be_given(rows: tuple[int, ...]) -> None:
    for name, arguments in calls(torch.float32, 24, rows).items():
        agree(name, arguments)


def test_rows_may_be_empty() -> None:
    for name, arguments in calls(torch.float32, 0).items():
        agree(name, arguments)


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_tables_may_have_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    for name, arguments in calls(dtype, 40, other=other).items():
        agree(name, arguments)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of a wider row": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "features apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "features outside": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
}


def laid_out(layout: str, each: Tensor) -> Tensor:
    """What is [3, 5, 24], or such rows as a matrix, in that layout; anything else as it is."""
    if each.shape not in ((3, 5, 24), (15, 24)):
        return each
    return LAYOUTS[layout](each) if each.dim() == 3 else LAYOUTS[layout](each.unsqueeze(1))[:, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_do_not_depend_on_strides(dtype: torch.dtype, layout: str) -> None:
    for name, arguments in calls(dtype, 24).items():
        change = [changed(partial(laid_out, layout), each) for each in arguments]
        agree(name, tuple(change))
        agree(name, (change[0], *arguments[1:]))


def test_queries_and_keys_are_turned_as_they_lie() -> None:
    q, k = draw(2, 5, 4, 16, dtype=torch.bfloat16).transpose(1, 2), draw(2, 5, 2, 16, dtype=torch.bfloat16).transpose(1, 2)
    cos, sin = draw(2, 1, 5, 16, dtype=torch.bfloat16), draw(2, 1, 5, 16, dtype=torch.bfloat16, seed=1)
    for interleaved in (False, True):
        agree("rotary", (q, k, cos, sin, interleaved, True))
        agree("rotary_bwd", (q, k, cos, sin, interleaved))
    actual = operator("rotary")(q, k, cos, sin, False, True)
    assert actual[0].stride() == q.stride() and actual[1].stride() == k.stride()


@pytest.mark.parametrize("turned", [16, 32, 48, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_heads_may_share_their_tables(dtype: torch.dtype, turned: int) -> None:
    """The heads inside or outside, the tables of each sequence or of all of them, in the dtype of the heads or another one."""
    for heads in (1, 3, 7, 8):
        for other in {dtype, torch.float32}:
            for tables in ((5,), (1, 1, 5), (2, 1, 5)):
                cos, sin = (draw(*tables, turned, dtype=other, seed=i) for i in range(2))
                inside = draw(2, 5, heads, 48, dtype=dtype).transpose(1, 2)
                for x in (inside, inside.contiguous()):
                    for interleaved in (False, True):
                        agree("rotary", (x, x, cos, sin, interleaved, True))
                        agree("rotary_bwd", (x, x, cos, sin, interleaved))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_may_be_halves_of_one_tensor_or_lie_alone(dtype: torch.dtype) -> None:
    for h in (24, 21):
        halves = draw(300, 2 * h, dtype=dtype).chunk(2, -1)
        for gate, up in (halves, [half[:299].contiguous() for half in halves]):
            for activation in ("silu", "gelu", "gelu_tanh"):
                agree("gated", (gate, up, activation, True))
                agree("gated_bwd", (gate, gate, up, activation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_so_where_it_is_in_the_reference(dtype: torch.dtype) -> None:
    for name, arguments in calls(dtype, 33).items():
        first = 2 if name.startswith("adamw_") else 0  # the gradients
        inputs = changed(torch.clone, arguments[first])
        every = tensors(inputs)[0].view(-1, 33)
        every[0, 3], every[6, 5], every[12, 7] = float("inf"), float("-inf"), float("nan")
        arguments = (*arguments[:first], inputs, *arguments[first + 1 :])
        actual, expected = (results(name, arguments, reference) for reference in (False, True))
        assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(actual, expected, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(256, 256)
    for scale in (1.0, 1e-4, 1e-8, 1e30):
        tables = [torch.full((1, 256), scale * each, dtype=torch.float32) for each in (1.2345, 0.0)]
        arguments = (every, every, *tables, True, False)
        actual, expected = (run(*arguments)[0] for run in (operator("rotary"), REFERENCES["rotary"]))
        assert bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())
        assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [(1 << 15) - 1, (1 << 15) + 1, 70001])
def test_a_vocabulary_may_be_read_in_pieces(dtype: torch.dtype, columns: int) -> None:
    rising = torch.linspace(-30, 30, columns, dtype=torch.float64)
    logits = torch.stack((rising, rising.flip(0), draw(columns) * 5)).to(dtype)
    labels, counted = torch.tensor([0, columns - 1, columns // 2]), torch.ones(3, dtype=torch.bool)
    largest, total, chosen = operator("cross_entropy_statistics")(logits, labels, counted, 0)
    exact = logits.double()
    assert torch.equal(largest, logits.amax(1).to(largest.dtype)) and torch.equal(chosen.double(), exact[range(3), labels])
    eps = torch.finfo(total.dtype).eps
    torch.testing.assert_close(total.double(), (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=4 * eps, atol=0)
    agree("cross_entropy_gradient", (logits, labels, counted, torch.stack((largest, total)), torch.rand(3), 0))


def test_logits_that_are_not_finite_give_what_the_reference_gives() -> None:
    inf, nan, columns = float("inf"), float("nan"), (1 << 15) + 40
    logits = torch.full((9, columns), -inf)
    # Columns of the first piece and of the second one.
    for row, found in enumerate(({}, {1: nan}, {-1: nan}, {1: inf}, {1: inf, -1: nan}, {1: nan, -1: inf}, {-1: 2.0}, {1: 3.0})):
        for column, number in found.items():
            logits[row, column] = number
    logits[8] = draw(columns).float()
    labels, counted = torch.tensor([1, 1, 1, 1, 1, 1, -1 + columns, 1, 2]), torch.ones(9, dtype=torch.bool)
    for dtype in DTYPES:
        inputs = (logits.to(dtype), labels, counted)
        actual, expected = (results("cross_entropy_statistics", (*inputs, 0), reference)[0] for reference in (False, True))
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=0)
        agree("cross_entropy_gradient", (*inputs, expected[:2], torch.ones(9), 0))
        agree("cross_entropy_gradient", (*inputs, expected[:2], torch.full((9,), inf), 0))


def test_what_lies_between_rows_is_not_written() -> None:
    held = torch.ones(4, 40)
    arguments = calls(torch.float32, 24, (4,))["cross_entropy_gradient_"][1:]
    operator("cross_entropy_gradient_")(held[:, 5:29], *arguments)
    assert bool((held[:, :5] == 1).all() and (held[:, 29:] == 1).all() and (held[:, 5:29] != 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tensors_are_gone_through_as_one(dtype: torch.dtype) -> None:
    """Tensors of several blocks, of a part of one, and of none, in any order."""
    for shapes in ([(0,), (8192,), (0,), (8193, 3), (), (0,), (5,), (16384,), (0,)], [(0,)], [(), (70001,)]):
        for name, arguments in calls_of_lists(dtype, shapes, torch.float16).items():
            agree(name, arguments)


def test_a_norm_that_float32_cannot_hold_is_infinite() -> None:
    for inputs in ([1e30], [1.5e19, 1.5e19], [1e19, float("-inf")]):
        gradients = [torch.tensor([each]) for each in inputs]
        assert results("grad_norm", (gradients,)) == results("grad_norm", (gradients,), reference=True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_bits_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    for name, arguments in calls(torch.bfloat16, 515, (7, 129)).items():
        actual = []
        for count in (1, 2, 3):
            threads(count)
            actual.append(results(name, arguments))
        assert all(torch.equal(a, b) for each in actual[1:] for a, b in zip(actual[0], each, strict=True)), name


def test_threads_may_call_them_at_once() -> None:
    some = calls(torch.float32, 96, (20,))

    def run(_: int) -> list[list[Tensor]]:
        return [results(name, inputs) for name, inputs in some.items()]

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(run, range(8)):
            assert all(torch.equal(a, b) for x, y in zip(actual, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_rows_may_lie_more_than_two_to_the_31_elements_apart() -> None:
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name: pages that are not touched take no memory
    held = mmap.mmap(-1, 7 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    far = torch.frombuffer(held, dtype=torch.bfloat16).as_strided((2, 2, 64), ((1 << 31) + 64, 1 << 30, 1))
    near = draw(2, 2, 64, dtype=torch.bfloat16)
    far.copy_(near)
    w, rstd = draw(64, dtype=torch.bfloat16), torch.ones(2, 2, 1)
    table = draw(1, 2, 64, dtype=torch.bfloat16)
    found: Calls = {
        "rms_norm": (far, w, EPS, 0.0, True),
        "add_rms_norm": (far, far, w, EPS, 0.0, True),
        "rms_norm_bwd": (far, far, far, w, rstd, 0.0),
        "layer_norm": (far, w, w, EPS, True),
        "layer_norm_bwd": (far, far, w, w, rstd, rstd),
        "rotary": (far, far, table, table, False, True),
        "rotary_bwd": (far, far, table, table, False),
        "gated": (far, far, "silu", True),
        "gated_bwd": (far, far, far, "silu"),
    }
    (labels, counted), first, normaliser = tokens(2, 64)
    some = (labels, counted, normaliser.float(), torch.ones(2), first)
    found |= {"cross_entropy_statistics": (far[:, 0], labels, counted, first), "cross_entropy_gradient": (far[:, 0], *some)}
    wide = near.float()
    lists = [[each] for each in (wide, near, far, wide, wide.square(), torch.zeros(()))]
    found |= {
        "grad_norm": ([far],),
        "adamw_": (*lists, torch.ones((), dtype=torch.float64), 0.9, 0.9, 1.0, 0.1, False, None, None),
    }
    for name, arguments in found.items():
        close = tuple(changed(Tensor.contiguous, each) for each in arguments)
        assert all(torch.equal(a, b) for a, b in zip(results(name, arguments), results(name, close), strict=True)), name


@pytest.mark.parametrize("name", calls(torch.float32, 8))
def test_they_are_what_torch_asks_of_an_operator(name: str) -> None:
    checks = ("test_schema", "test_faketensor")
    opcheck(getattr(torch.ops.shardcomp, name.partition(" ")[0]).default, calls(torch.float32, 8)[name], test_utils=checks)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: torch.ops.shardcomp.rms_norm(x.long(), None, EPS, 0.0, True), "bfloat16"),
        (lambda x: torch.ops.shardcomp.rms_norm(x, x[0, :4], EPS, 0.0, True), "the size of the last dimension"),
        (lambda x: torch.ops.shardcomp.gated(x, x, "relu", True), "silu, gelu and gelu_tanh"),
        (lambda x: torch.ops.shardcomp.rotary(x, x, x[0, :3], x[0, :3], True, True), "even number"),
        (lambda x: torch.ops.shardcomp.cross_entropy_statistics(x, *[torch.ones(4, dtype=torch.bool)] * 2, 0), "int64"),
        (lambda x: torch.ops.shardcomp.cross_entropy_statistics(x, *tokens(4, 5)[0], 0), "every token"),
    ],
)
def test_what_they_cannot_compute_is_refused(call: Callable[[Tensor], Any], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        call(torch.ones(3, 5))


def test_an_empty_choice_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "_loaded", None)
    unset = library.load()
    monkeypatch.setenv(library.VARIABLE, "")
    monkeypatch.setattr(library, "_loaded", None)
    assert library.choice() == "auto" and library.load() == unset
    monkeypatch.setenv(library.VARIABLE, "none")
    monkeypatch.setattr(library, "_loaded", None)
    with pytest.raises(KernelError, match="SHARDCOMP_KERNELS=none: there is no such choice"):
        library.load()
