"""Dropout, alone and in scaled dot-product attention, and the stream of random numbers that it draws from.

The rules are those of the operators without dropout, for a cut only: a mask is drawn for what a rank holds, so a rank's stream
must differ from its neighbours' exactly where the ranks drop from different numbers (`stream_for`). Partial operands are summed
first, scattered where the sequence is cut: a rank then keeps the mask of its own piece alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.layout import Placement
from shardcomp.sharding.rules import RULES, Rule, pointwise, scaled_attention

SHARED, OWN, PIECE = "shared", "own", "piece"
"""The streams of a rank: shared by the ranks of tp, its own, and shared by the ranks that hold copies of one piece."""


class Stream:
    """Random numbers on one device. Nothing but what names it draws from it, and it leaves torch's own numbers as they are."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def keep(self, x: Tensor, p: float) -> Tensor:
        """What of `x` is kept: bool, in the shape of `x`, False with probability p."""
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=self.generator)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within, what draws from the GPU's default generator draws from this stream. Nothing is copied or waited for.

        Only for a GPU, which is one rank's: the default generator of the CPU belongs to all threads of the process.
        """
        default = torch.cuda.default_generators[self.generator.device.index]
        before = default.graphsafe_get_state()
        default.graphsafe_set_state(self.generator)
        try:
            yield
        finally:
            default.graphsafe_set_state(before)


def dropout(x: Tensor, p: float, random: Stream) -> Tensor:
    """`x` with each element zeroed with probability p, the others scaled by 1 / (1 - p)."""
    if x.is_cuda:
        with random.lent():
            return functional.dropout(x, p)
    return torch.where(random.keep(x, p), x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    random: Stream | None = None,
) -> Tensor:
    """torch's `scaled_dot_product_attention`, which drops by `random`, where one is given.

    On the CPU it is taken in steps, as torch takes it there when it drops; the softmax is in float32 at least.
    """
    if not dropout_p or random is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.is_cuda:
        with random.lent():
            return dropped_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (held.repeat_interleave(query.shape[-3] // held.shape[-3], -3) for held in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
    # Zero, not NaN, for a query that sees no key.
    weights = torch.ops.aten._safe_softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return dropout(weights, dropout_p, random) @ value


def stream_for(node: fx.Node, placement: Placement) -> str:
    """The stream for a call whose result lies as `placement` says: by whether the ranks drop from the same numbers.

    What attention drops are weights [b, n, q, k]; a cut of the values' last dimension leaves those whole.
    """
    if placement.dim is None or (node.target is not dropout and placement.dim == 3):
        return SHARED
    return OWN if placement.copies == 1 else PIECE


RULES[dropout] = Rule(function=pointwise)
RULES[dropped_attention] = Rule(function=scaled_attention)
