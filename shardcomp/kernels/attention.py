"""Attention as one operator: heads not repeated, masks as [b, s] tensors. Here is its reference, which is its specification.

`torch.ops.shardcomp.attention` is what a capture records; a canonical program calls the Python function `attention`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from shardcomp.ir.program import value
from shardcomp.kernels.attention_providers import check, kernel_of, xformers_attention
from shardcomp.kernels.dropout import Stream, dropped_attention
from shardcomp.kernels.dropout import dropout as drop
from shardcomp.sharding.rules import RULES, Factoring, Rule, apply, parse


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

    q: [b, n, q, d]. k: [b, m, k, d]. v: [b, m, k, e], where m divides n: n / m neighbouring query heads share a key head.
    q_position, k_position: [b, q] and [b, k] int64, by default 0, 1, 2, …
    causal: a query sees the keys at its own and earlier positions; with `window`, that many positions, its own included.
    q_segment, k_segment: [b, q] and [b, k] int64; a query sees the keys of its own segment.
    key_mask: [b, k] bool, False for keys that nobody sees. bias: broadcasts to [b, n, q, k], floating, added to the scores.
    softcap: scores become softcap · tanh(scores / softcap). sinks: [n] floating, the score of one more key per head, whose
    value is zero.
    scale: by default 1 / √d. dropout: the probability that a weight is dropped. random: what is drawn from; by default it is
    torch's own generator. provider: one of `providers.PROVIDERS`, which runs it or raises KernelError.
    Result: [b, n, q, e] in the dtype of q. Raises ValueError for a window without `causal`.
    """
    if window is not None and not causal:
        raise ValueError("a window is counted back from a query's own position: it needs causal=True")
    if isinstance(q, FakeTensor) and provider != "eager":
        provider = "sdpa"  # without a device to run on, all save what torch's flash attention saves
    masks = {"q_position": q_position, "q_segment": q_segment, "key_mask": key_mask, "bias": bias}
    asked = {name: held is not None for name, held in masks.items()} | {
        "softcap": softcap,
        "dropout": dropout,
        "window": window,
    }
    check(provider, {**asked, "sinks": sinks is not None})

    def seen() -> tuple[Tensor, Tensor]:
        keys = _seen(q, k, (q_position, k_position), (q_segment, k_segment), key_mask, causal, window)
        return keys, keys.any(-1, keepdim=True)

    if provider == "xformers":
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "dropout": dropout, "random": random}
        masked = q_position is not None or key_mask is not None or q_segment is not k_segment
        return xformers_attention(q, k, v, seen, segments=q_segment, masked=masked, bias=bias, **options)
    grouped = q.shape[1] != k.shape[1]
    explicit = provider == "eager" or softcap is not None or sinks is not None
    with kernel_of(provider, q.device):
        if not explicit and window is None and all(held is None for held in masks.values()):
            return dropped_attention(q, k, v, None, dropout, causal, scale=scale, enable_gqa=grouped, random=random)
        keys, visible = seen()
        # A query that sees no key is let see all of them and zeroed afterwards: a softmax over nothing would be NaN.
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
    """Which keys each query sees: bool, broadcasts to [b, 1, q, k] in its first dimension."""
    parts = [torch.ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device)]
    if causal:
        at, of = (
            torch.arange(tensor.shape[2], device=q.device).unsqueeze(0) if given is None else given
            for tensor, given in zip((q, k), positions, strict=True)
        )
        back = at[:, None, :, None] - of[:, None, None, :]
        parts.append(back >= 0)
        if window is not None:
            parts.append(back < window)
    if segments[0] is not None and segments[1] is not None:
        parts.append(segments[0][:, None, :, None] == segments[1][:, None, None, :])
    if key_mask is not None:
        parts.append(key_mask[:, None, None, :])
    return reduce(torch.logical_and, parts)


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
    """What `scaled_dot_product_attention` has no argument for, step by step; the softmax is in float32 at least."""
    heads = q.unflatten(1, (k.shape[1], -1))
    scores = (heads @ k.unsqueeze(2).mT).flatten(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = functional.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    weights = weights[..., : k.shape[2]]
    if dropout:
        weights = functional.dropout(weights, dropout) if random is None else drop(weights, dropout, random)
    return (weights.unflatten(1, (k.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2)


_MASKS = "q_position: b q!, k_position: b k!, q_segment: b q!, k_segment: b k!, key_mask: b k!, bias: b n q! k!, sinks: n"
# One factor n for query and key heads: cut alike, neighbouring query heads stay with the key head that they share. There may
# be fewer key heads than ranks.
_COARSE = frozenset({1, 2})
_NOTATION = parse(f"b n q! d!, b n k! d!, b n k! e, {_MASKS} -> b n q! e")


def _rule(node: fx.Node) -> Factoring | None:
    """The line above, where a dimension of one that a bias broadcasts has no factor."""
    found = apply(_NOTATION, node, {})
    bias = node.kwargs.get("bias")
    if found is None or not isinstance(bias, fx.Node):
        return found and replace(found, coarse=_COARSE)
    at = [argument for argument in (*node.args, *node.kwargs.values()) if isinstance(argument, fx.Node)].index(bias)
    dims = tuple(None if size == 1 else dim for dim, size in zip(found.operands[at], value(bias).shape, strict=True))
    return Factoring((*found.operands[:at], dims, *found.operands[at + 1 :]), found.results, coarse=_COARSE)


RULES[attention] = Rule(function=_rule)  # type: ignore[arg-type]

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
"""`attention` as the operator that a capture records. It has no gradient: programs call the function."""
SETTINGS = {argument.name: argument.default_value for argument in RECORDED._schema.arguments[3:]}
"""What `attention` takes after q, k and v, in the operator's order, with its defaults."""
