"""Dropout, alone and in scaled dot-product attention, and the random stream that it draws from.

Operands may be sharded as for the operators without dropout. Each rank draws a mask for its own shard, so the streams of two
ranks must differ exactly where their shards do (`stream_for`). Partial operands are reduced first, and reduce-scattered where
the sequence is split, so that a rank saves the mask of its own shard alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.layout import Placement
from shardcomp.kernels.register import register
from shardcomp.sharding.rules import pointwise, scaled_attention
from shardcomp.torch_private import safe_softmax

SHARED, OWN, SAME_SHARD = "shared", "own", "same_shard"
"""The streams of a rank: shared by all ranks of tp, its own, and shared by the ranks that have the same shard."""


class Stream:
    """Random numbers on one device, independent of torch's default generator."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def keep(self, x: Tensor, p: float) -> Tensor:
        """A mask in the shape of `x`: bool, False with probability p."""
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=self.generator)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """In this context, operators that use the GPU's default generator draw from this stream.

        The two share their state, so nothing is copied and the host does not wait. Only for a GPU, which belongs to one rank:
        the CPU's default generator belongs to all threads of the process.
        """
        # graphsafe_set_state exchanges the state object itself; set_state would copy it from and to the host.
        default = torch.cuda.default_generators[self.generator.device.index]
        before = default.graphsafe_get_state()
        default.graphsafe_set_state(self.generator)
        try:
            yield
        finally:
            default.graphsafe_set_state(before)


def dropout(x: Tensor, p: float, random: Stream) -> Tensor:
    """`x` with each element zeroed with probability p and the others scaled by 1 / (1 - p).

    Args:
        x: [..] floating.
        p: between 0 and 1.
        random: the stream of the mask, on the device of `x`.

    Returns:
        The shape and dtype of `x`.

    Example:
        >>> import torch
        >>> stream = Stream(0, torch.device("cpu"))
        >>> result = dropout(torch.ones(1000), 0.5, stream)
        >>> sorted(set(result.tolist())), 400 < int((result == 0).sum()) < 600
        ([0.0, 2.0], True)
    """
    if x.is_cuda:
        # torch's own kernel computes mask and product in one pass, and its backward saves a mask of one byte an element.
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
    """torch's `scaled_dot_product_attention`, with dropout that draws from `random` if there is one.

    On the CPU with dropout it is written out in operators, as torch does there too; the softmax is in float32 or wider.

    Args:
        query: [.., n, q, d].
        key: [.., m, k, d], where m divides n with `enable_gqa`, else m = n.
        value: [.., m, k, e].
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in torch.
        random: the stream of the dropout mask; None: torch's default generator.

    Returns:
        [.., n, q, e] in the dtype of `query`.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> dropped_attention(q, q, torch.tensor([[[[1.0], [3.0]]]])).flatten()
        tensor([2., 2.])
    """
    if not dropout_p or random is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.is_cuda:
        with random.lent():
            return dropped_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) for heads in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
    # Zero, not NaN, for a query that sees no key.
    weights = safe_softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return dropout(weights, dropout_p, random) @ value


def stream_for(node: fx.Node, placement: Placement) -> str:
    """The stream for a call whose result has a placement: the ranks of one mask must draw the same numbers.

    Attention drops weights [b, n, q, k]; splitting the last dimension of the values leaves these replicated.
    """
    if placement.dim is None or (node.target is not dropout and placement.dim == 3):
        return SHARED
    return OWN if placement.copies == 1 else SAME_SHARD


register(dropout, "dropout", rule=pointwise, rows="pointwise", backward="nothing")
register(dropped_attention, "attention", rule=scaled_attention, kernel="attention")
