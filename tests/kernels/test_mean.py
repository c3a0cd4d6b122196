"""The mean over a divided dimension: the ranks' summands add up to it, and their gradients are its own."""

from __future__ import annotations

import torch

from shardcomp.ir.collectives import Axis
from shardcomp.kernels.mean import split_mean


def test_the_summands_add_up_to_the_mean() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    pieces = [piece.detach().requires_grad_() for piece in x.chunk(4, 2)]
    actual = [split_mean(piece, [-1], True, 8, Axis("tp", 4, rank)) for rank, piece in enumerate(pieces)]
    seed = torch.randn(2, 3, 1, dtype=torch.float64)
    x.mean(-1, keepdim=True).backward(seed)
    torch.stack(actual).sum(0).backward(seed)
    torch.testing.assert_close(torch.stack(actual).sum(0), x.mean(-1, keepdim=True))
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([piece.grad for piece in pieces if piece.grad is not None], 2), x.grad)
