"""Cross entropy per token, whole and over a divided vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from shardcomp.fusion.equivalence import equal_bits
from shardcomp.ir.mesh import Mesh
from shardcomp.kernels import cross_entropy, vocab_cross_entropy
from shardcomp.runtime import world
from shardcomp.verification.thread_ranks import run_ranks


def case(tokens: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens * 1000 + columns)
    logits = torch.randn(tokens, columns, generator=draw, dtype=torch.float64).mul_(5).to(dtype)
    labels = torch.randint(0, columns, (tokens,), generator=draw)
    labels[::3] = -100
    return logits, labels


def split(logits: Tensor, labels: Tensor, ranks: int, seed: Tensor) -> tuple[list[Tensor], Tensor]:
    """The losses on every rank, and the gradient of the logits put together."""

    def work(rank: int) -> tuple[Tensor, Tensor]:
        mesh, _ = world.start(Mesh(tp=ranks))
        piece = logits.chunk(ranks, 1)[rank].clone().requires_grad_()
        loss = vocab_cross_entropy(piece, labels, -100, logits.shape[1], world.axes_of(mesh)["tp"])
        loss.backward(seed)
        return loss.detach(), piece.grad

    found = run_ranks(ranks, work)
    return [loss for loss, _ in found], torch.cat([gradient for _, gradient in found], 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "columns"), [(7, 12), (1, 5), (13, 97), (4, 4), (0, 8)])
def test_a_divided_vocabulary_gives_the_losses_and_gradients_of_the_whole(ranks: int, tokens: int, columns: int) -> None:
    logits, labels = case(tokens, columns)
    if -(-columns // ranks) * (ranks - 1) >= columns:
        pytest.skip("a rank without columns is refused by the policy")
    whole = logits.clone().requires_grad_()
    seed = torch.linspace(0.5, 2, tokens, dtype=torch.float64)
    expected = functional.cross_entropy(whole, labels, ignore_index=-100, reduction="none")
    expected.backward(seed)
    losses, gradient = split(logits, labels, ranks, seed)
    for loss in losses:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-14)


def test_large_logits_do_not_overflow() -> None:
    logits, labels = case(6, 10, torch.float32)
    losses, _ = split(logits * 1e4, labels, 2, torch.ones(6))
    torch.testing.assert_close(losses[0], cross_entropy(logits * 1e4, labels, -100))


def test_a_logit_that_is_not_a_number_makes_its_own_token_not_a_number_and_no_other() -> None:
    logits, labels = case(5, 8)
    logits[1, 6] = float("nan")
    losses, _ = split(logits, labels, 2, torch.ones(5, dtype=torch.float64))
    assert torch.equal(losses[0].isnan(), torch.arange(5) == 1)


def test_a_masked_column_has_no_weight() -> None:
    logits, labels = case(5, 8)
    logits[:, 0] = float("-inf")
    labels = torch.where(labels == 0, 1, labels)
    losses, gradient = split(logits, labels, 2, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(losses[0], cross_entropy(logits, labels, -100))
    assert bool((gradient[:, 0] == 0).all())


def test_tokens_that_do_not_count_are_zero_and_give_no_gradient() -> None:
    logits, labels = case(6, 10)
    losses, gradient = split(logits, torch.full_like(labels, -100), 2, torch.ones(6, dtype=torch.float64))
    assert not losses[0].any() and not gradient.any()


def test_a_rank_whose_columns_are_all_masked_adds_nothing() -> None:
    logits, labels = case(5, 8)
    logits[:, :4] = float("-inf")
    labels = torch.where(labels >= 0, labels % 4 + 4, labels)
    losses, gradient = split(logits, labels, 2, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(losses[0], functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none"))
    assert bool((gradient[:, :4] == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_give_wide_losses_and_the_gradient_that_widening_them_gives(dtype: torch.dtype) -> None:
    logits, labels = case(67, 131, dtype)
    whole, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = functional.cross_entropy(whole.float(), labels, ignore_index=-100, reduction="none")
    actual = cross_entropy(ours, labels, -100)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    expected.backward(torch.ones(67))
    actual.backward(torch.ones(67))
    assert whole.grad is not None and ours.grad is not None and ours.grad.dtype == dtype
    assert equal_bits(ours.grad, whole.grad) > 0.999 or dtype == torch.float32
    torch.testing.assert_close(ours.grad, whole.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 5])
def test_its_operators_are_well_formed(tokens: int, dtype: torch.dtype) -> None:
    logits, labels = case(tokens, 9, dtype)
    counted = labels != -100
    statistics = torch.ops.shardcomp.cross_entropy_statistics(logits, labels, counted, 2)
    normaliser = statistics[:2]
    opcheck(torch.ops.shardcomp.cross_entropy_statistics.default, (logits, labels, counted, 2))
    inputs = (labels, counted, normaliser, torch.ones_like(normaliser[0]), 2)
    opcheck(torch.ops.shardcomp.cross_entropy_gradient.default, (logits, *inputs))
    opcheck(torch.ops.shardcomp.cross_entropy_gradient_.default, (logits.clone(), *inputs))
    over = logits.clone()
    torch.ops.shardcomp.cross_entropy_gradient_(over, *inputs)
    assert torch.equal(over, torch.ops.shardcomp.cross_entropy_gradient(logits, *inputs))


def test_it_compiles_and_exports_as_it_is() -> None:
    logits, labels = case(13, 31)
    logits.requires_grad_()
    actual = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")(logits, labels, -100)
    assert torch.equal(actual, cross_entropy(logits, labels, -100))
    seed = torch.linspace(0.5, 2, 13, dtype=torch.float64)
    found = [torch.autograd.grad(each, logits, seed)[0] for each in (actual, cross_entropy(logits, labels, -100))]
    assert torch.equal(*found)

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return cross_entropy(logits, labels, -100)

    graph = torch.export.export(Module(), (logits,), strict=False).graph
    assert any(str(node.target) == "shardcomp.cross_entropy_statistics.default" for node in graph.nodes)
