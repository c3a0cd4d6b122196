"""Attention as one operator: key heads are not repeated, and masks are [b, s] tensors instead of [s, s] ones.

The function here is the specification; `provider` chooses what computes it. A capture records `torch.ops.shardcomp.attention`;
a canonical program calls the Python function `attention`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shardcomp.ir.nodes import value
from shardcomp.kernels.attention_providers import check, kernel_of, xformers_attention
from shardcomp.kernels.dropout import Stream, dropped_attention
from shardcomp.kernels.dropout import dropout as drop
from shardcomp.kernels.register import register
from shardcomp.sharding.notation import parse
from shardcomp.sharding.rules import Factoring, apply
from shardcomp.torch_private import FakeTensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_position: Tensor | None = None,
    k_position: Tensor | None = None,
    q_segment: Tensor | None = None,
    k_segment: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    random: Stream | None = None,
    provider: str = "sdpa",
) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys that each query sees. A query that sees no key gives zero, with zero gradients.

    Args:
        q: [b, n, q, d] floating.
        k: [b, m, k, d], where m divides n; n / m neighbouring query heads share a key head.
        v: [b, m, k, e].
        q_position: [b, q] int64; None: 0, 1, 2, …
        k_position: [b, k] int64; None: 0, 1, 2, …
        q_segment: [b, q] int64; a query sees the keys of its own segment alone.
        k_segment: [b, k] int64.
        key_mask: [b, k] bool, False for keys that no query sees.
        bias: floating, broadcasts to [b, n, q, k]; added to the scores.
        sinks: [n] floating, the score of one more key for each head, whose value is zero.
        causal: a query sees the keys at its own and earlier positions.
        window: a query sees that many positions, its own included; needs `causal`.
        softcap: scores become softcap · tanh(scores / softcap).
        scale: None: 1 / √d.
        dropout: the probability that a weight is dropped.
        random: the stream of the dropout mask; None: torch's default generator.
        provider: one of `attention_providers.PROVIDERS`.

    Returns:
        [b, n, q, e] in the dtype of `q`.

    Raises:
        ValueError: a window without `causal`.
        KernelError: the provider cannot run this attention here.

    Example:
        >>> import torch
        >>> q = torch.zeros(1, 1, 2, 4)  # equal scores: each query averages the values that it sees
        >>> attention(q, q, torch.tensor([[[[1.0], [3.0]]]])).flatten()
        tensor([1., 2.])
    """
    if window is not None and not causal:
        raise ValueError("a window is counted back from a query's own position: it needs causal=True")
    if isinstance(q, FakeTensor) and provider != "eager":
        provider = "sdpa"  # nothing runs; every provider saves as much memory as torch's flash attention
    masks = {"q_position": q_position, "q_segment": q_segment, "key_mask": key_mask, "bias": bias}
    used = {name: mask is not None for name, mask in masks.items()} | {
        "softcap": softcap,
        "dropout": dropout,
        "window": window,
    }
    check(provider, {**used, "sinks": sinks is not None})

    def seen() -> tuple[Tensor, Tensor]:
        keys = _seen(q, k, (q_position, k_position), (q_segment, k_segment), key_mask, causal, window)
        return keys, keys.any(-1, keepdim=True)

    if provider == "xformers":
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "dropout": dropout, "random": random}
        masked = q_position is not None or key_mask is not None or q_segment is not k_segment
        return xformers_attention(q, k, v, seen, segments=q_segment, masked=masked, bias=bias, **options)
    # Only with several query heads for each key head: enable_gqa rules out some of torch's kernels.
    grouped = q.shape[1] != k.shape[1]
    # torch's kernels have no softcap and no sinks.
    explicit = provider == "eager" or softcap is not None or sinks is not None
    with kernel_of(provider, q.device):
        if not explicit and window is None and all(mask is None for mask in masks.values()):
            return dropped_attention(q, k, v, None, dropout, causal, scale=scale, enable_gqa=grouped, random=random)
        keys, visible = seen()
        # A query that sees no key gets all of them here and zeros afterwards: a softmax over nothing would be NaN.
        keys = keys | ~visible
        if explicit:
            out = _explicit(q, k, v, keys, bias, sinks, softcap, scale, dropout, random)
        else:
            mask = keys if bias is None else torch.where(keys, bias.to(q.dtype), float("-inf"))
            out = dropped_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped, random=random)
    return out.masked_fill(~visible, 0)


def _seen(
    q: Tensor,
    k: Tensor,
    positions: tuple[Tensor | None, Tensor | None],
    segments: tuple[Tensor | None, Tensor | None],
    key_mask: Tensor | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Which keys each query sees: bool [b or 1, 1, q, k]."""
    masks = [torch.ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device)]
    if causal:
        at, of = (
            torch.arange(tensor.shape[2], device=q.device).unsqueeze(0) if position is None else position
            for tensor, position in zip((q, k), positions, strict=True)
        )
        back = at[:, None, :, None] - of[:, None, None, :]
        masks.append(back >= 0)
        if window is not None:
            masks.append(back < window)
    if segments[0] is not None and segments[1] is not None:
        masks.append(segments[0][:, None, :, None] == segments[1][:, None, None, :])
    if key_mask is not None:
        masks.append(key_mask[:, None, None, :])
    return reduce(torch.logical_and, masks)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    scale: float | None,
    dropout: float,
    random: Stream | None,
) -> Tensor:
    """Attention written out, for options that `scaled_dot_product_attention` lacks. The softmax is in float32 or wider."""
    heads = q.unflatten(1, (k.shape[1], -1))
    scores = (heads @ k.unsqueeze(2).mT).flatten(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    # After the bias: a bias of +inf must not reveal a hidden key.
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        # A sink takes its share of the softmax and has no value: its column is appended here and dropped after the softmax.
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = functional.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    weights = weights[..., : k.shape[2]]
    if dropout:
        weights = functional.dropout(weights, dropout) if random is None else drop(weights, dropout, random)
    return (weights.unflatten(1, (k.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2)


_MASKS = "q_position: b q!, k_position: b k!, q_segment: b q!, k_segment: b k!, key_mask: b k!, bias: b n q! k!, sinks: n"
# Query and key heads have one factor n: split alike, neighbouring query heads stay with the key head that they share. There may
# be fewer key heads than ranks.
_COARSE = frozenset({1, 2})
_NOTATION = parse(f"b n q! d!, b n k! d!, b n k! e, {_MASKS} -> b n q! e")


def _rule(node: fx.Node) -> Factoring | None:
    """The line above, without a factor for the dimensions that a bias broadcasts."""
    factoring = apply(_NOTATION, node, {})
    bias = node.kwargs.get("bias")
    if factoring is None or not isinstance(bias, fx.Node):
        return factoring and replace(factoring, coarse=_COARSE)
    at = [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node)].index(bias)
    dims = tuple(None if size == 1 else dim for dim, size in zip(factoring.operands[at], value(bias).shape, strict=True))
    return Factoring((*factoring.operands[:at], dims, *factoring.operands[at + 1 :]), factoring.results, coarse=_COARSE)


register(attention, "attention", "mixes_tokens", rule=_rule, kernel="attention")

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? q_position=None, Tensor? k_position=None, Tensor? q_segment=None, "
    "Tensor? k_segment=None, Tensor? key_mask=None, Tensor? bias=None, Tensor? sinks=None, bool causal=True, "
    "int? window=None, float? softcap=None, float? scale=None, float dropout=0.0) -> Tensor"
)


@torch.library.custom_op("shardcomp::attention", mutates_args=(), schema=_SCHEMA)
def _recorded(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return attention(q, k, v, **dict(zip(SETTINGS, settings, strict=False)))


@_recorded.register_fake
def _shape(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


RECORDED = torch.ops.shardcomp.attention.default
"""The operator that a capture records in place of `attention`. It has no gradient: programs call the function."""
SETTINGS = {argument.name: argument.default_value for argument in RECORDED._schema.arguments[3:]}
"""The arguments of `attention` after q, k and v, in the operator's order, with their defaults."""
