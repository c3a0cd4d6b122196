"""The last product and its cross entropy as one: against float64, whole and over a divided vocabulary, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shardcomp.ir.mesh import Mesh
from shardcomp.kernels import linear_cross_entropy
from shardcomp.kernels.linear_cross_entropy import vocab_linear_cross_entropy
from shardcomp.runtime import world
from shardcomp.verification.thread_ranks import run_ranks

STEPS: dict[str, tuple[tuple[str, Any], ...]] = {
    "plain": (),
    "scaled": (("mul", 0.0625),),
    "capped": (("div", 3.0), ("tanh", None), ("mul", 3.0)),
    "widened first": (("to", torch.float32), ("div", 8.0)),
}


@dataclass
class Case:
    """Operands in float64: x [t, h], weight [v, h], bias [v], and labels of which a third do not count."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    steps: tuple[tuple[str, Any], ...] = ()

    @property
    def count(self) -> Tensor:
        return (self.labels != -100).sum()

    def operands(self, dtype: torch.dtype) -> list[Tensor]:
        return [held.to(dtype, copy=True).requires_grad_() for held in (self.x, self.weight, self.bias)]

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a model computes, in the dtypes that it has."""
        logits = functional.linear(x, weight, bias)
        for name, number in self.steps:
            if name == "tanh":
                logits = logits.tanh()
            elif name == "to":
                logits = logits.to(torch.promote_types(number, logits.dtype))
            else:
                logits = logits * number if name == "mul" else logits / number
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide, self.labels, ignore_index=-100, reduction="sum") / self.count

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        return linear_cross_entropy(x, weight, self.labels, self.count, bias, ignore_index=-100, steps=self.steps, **how)


def case(tokens: int = 29, width: int = 7, columns: int = 31, steps: str = "plain") -> Case:
    draw = torch.Generator().manual_seed(tokens * 1000 + columns)
    x, weight, bias = (
        torch.randn(*n, generator=draw, dtype=torch.float64) for n in ((tokens, width), (columns, width), (columns,))
    )
    labels = torch.randint(0, columns, (tokens,), generator=draw)
    labels[1::3] = -100
    return Case(x, weight, bias, labels, STEPS[steps])


def gradients(loss: Tensor, operands: list[Tensor], seed: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(loss, operands, torch.full_like(loss, seed)))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("chunks", [1, 3, 29, 40])
@pytest.mark.parametrize("steps", STEPS)
def test_loss_and_gradients_are_those_of_the_two_in_a_row(steps: str, chunks: int, early: bool) -> None:
    inputs = case(steps=steps)
    operands = inputs.operands(torch.float64)
    expected, actual = inputs.dense(*operands), inputs.fused(*operands, chunks=chunks, early=early)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients(actual, operands, 0.3), gradients(expected, operands, 0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("width", [64, 160])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_no_further_from_float64_than_those_of_the_model(
    dtype: torch.dtype, width: int, steps: str, early: bool
) -> None:
    errors: list[list[float]] = []
    for tokens in range(250, 260):  # one draw of few numbers tells little
        inputs = case(tokens, width, 131, steps)
        operands = inputs.operands(dtype)
        exact = [held.detach().double().requires_grad_() for held in operands]
        actual, theirs, truth = inputs.fused(*operands, chunks=3, early=early), inputs.dense(*operands), inputs.dense(*exact)
        assert actual.dtype == torch.float32
        assert (actual.double() - truth).abs() <= 1.05 * (theirs.double() - truth).abs() + 2e-7 * truth.abs()
        errors.append([])
        every = zip(gradients(actual, operands), gradients(theirs, operands), gradients(truth, exact), strict=True)
        for ours, other, true in every:
            assert ours.dtype == dtype
            apart = [(each.double() - true).norm() for each in (ours, other)]
            errors[-1].append(float(apart[0] / apart[1]))
    assert all(sum(ratios) / len(ratios) <= 1.05 for ratios in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("early", [True, False])
def test_only_the_gradients_that_are_asked_for_are_computed(early: bool) -> None:
    inputs = case()
    for wanted in range(1, 8):
        operands = [
            held.detach().requires_grad_(bool(wanted >> i & 1)) for i, held in enumerate(inputs.operands(torch.float64))
        ]
        graded = [held for held in operands if held.requires_grad]
        found = gradients(inputs.fused(*operands, chunks=2, early=early), graded)
        for a, b in zip(found, gradients(inputs.dense(*operands), graded), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    x, weight, _ = inputs.operands(torch.float64)
    with torch.no_grad():
        actual = inputs.fused(x, weight, None, chunks=2, early=early)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, inputs.dense(x, weight, None).detach())


@pytest.mark.parametrize("early", [True, False])
def test_no_token_and_no_token_that_counts(early: bool) -> None:
    x, weight, _ = case().operands(torch.float64)
    labels = torch.full((29,), -100)
    for rows in (0, 29):
        loss = linear_cross_entropy(x[:rows], weight, labels[:rows], 5, ignore_index=-100, chunks=4, early=early)
        assert loss == 0 and not any(g.any() for g in gradients(loss, [x, weight]))


@pytest.mark.parametrize("early", [True, False])
def test_what_is_not_finite_makes_the_loss_so(early: bool) -> None:
    for bad in (float("nan"), float("inf")):
        inputs = case()
        inputs.x[3] = bad
        assert not inputs.fused(*inputs.operands(torch.float64), chunks=4, early=early).isfinite()
        inputs = case()
        inputs.x[1] = bad  # a token that does not count
        operands = inputs.operands(torch.float64)
        loss = inputs.fused(*operands, chunks=4, early=early)
        torch.testing.assert_close(loss, inputs.dense(*operands))


def test_the_same_numbers_come_out_every_time_and_twice_from_one_forward() -> None:
    inputs = case(67, 16, 97)
    for early in (True, False):
        operands = inputs.operands(torch.bfloat16)
        loss = inputs.fused(*operands, chunks=4, early=early)
        one = torch.autograd.grad(loss, operands, retain_graph=True)
        two = torch.autograd.grad(loss, operands)
        three = gradients(inputs.fused(*operands, chunks=4, early=early), operands)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for actual in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(actual, Tensor):
                self.elements = max(self.elements, actual.numel())
        return result


@pytest.mark.parametrize("early", [True, False])
def test_neither_are_logits_kept_nor_all_of_them_made(early: bool) -> None:
    tokens, width, columns = 512, 8, 128
    inputs = case(tokens, width, columns)
    x, weight, _ = inputs.operands(torch.float32)
    kept: list[Tensor] = []
    with Largest() as largest, saved_tensors_hooks(lambda held: kept.append(held) or held, lambda held: held):
        gradients(inputs.fused(x, weight, None, chunks=8, early=early), [x, weight])
    assert largest.elements == tokens * columns // 8
    foreign = {held.untyped_storage().data_ptr() for held in (x, weight, inputs.labels)}
    size = sum(held.nbytes for held in kept if held.untyped_storage().data_ptr() not in foreign)
    assert size <= (4 * (x.numel() + weight.numel()) if early else 17 * tokens)


def split(inputs: Case, ranks: int, **how: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The losses on every rank, and the gradients of x, weight and bias put together."""

    def work(rank: int) -> tuple[Tensor, list[Tensor]]:
        mesh, _ = world.start(Mesh(tp=ranks))
        x, weight, bias = (
            held.clone().requires_grad_() for held in (inputs.x, *(w.chunk(ranks)[rank] for w in (inputs.weight, inputs.bias)))
        )
        settings = (-100, how["chunks"], how["early"], inputs.steps, inputs.weight.shape[0], world.axes_of(mesh)["tp"])
        loss = vocab_linear_cross_entropy(x, weight, inputs.labels, inputs.count, bias, *settings)
        return loss.detach(), gradients(loss, [x, weight, bias], 0.7)

    found = run_ranks(ranks, work)
    parts = list(zip(*(each for _, each in found), strict=True))
    return [loss for loss, _ in found], [torch.stack(parts[0]).sum(0), torch.cat(parts[1]), torch.cat(parts[2])]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(("ranks", "columns"), [(1, 31), (2, 31), (3, 12), (4, 97)])
def test_a_divided_vocabulary_gives_the_loss_and_the_gradients_of_the_whole(ranks: int, columns: int, early: bool) -> None:
    inputs = case(23, 5, columns, "capped")
    operands = inputs.operands(torch.float64)
    expected = inputs.dense(*operands)
    losses, found = split(inputs, ranks, chunks=3, early=early)
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=1e-13)
    for a, b in zip(found, gradients(expected, operands, 0.7), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("early", [True, False])
def test_it_compiles_and_exports_as_it_is(early: bool) -> None:
    inputs = case()
    operands = inputs.operands(torch.float64)

    def run(*held: Tensor) -> Tensor:
        return inputs.fused(*held, chunks=3, early=early)

    expected, actual = run(*operands), torch.compile(run, fullgraph=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(gradients(actual, operands), gradients(expected, operands), strict=True):
        torch.testing.assert_close(a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return run(x, weight, bias)

    graph = torch.export.export(Module(), tuple(operands), strict=False).graph
    found = {str(node.target) for node in graph.nodes if "shardcomp" in str(node.target)}
    assert found == {
        f"shardcomp.cross_entropy_{which}.default" for which in (["statistics", "gradient_"] if early else ["statistics"])
    }
