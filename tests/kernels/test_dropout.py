"""Dropout: what it keeps, how it scales, its gradient; attention that drops, against torch's own for a given mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.test_attention import MASKS, operands
from torch import Tensor, fx

from shardcomp.ir.layout import REPLICATED, copied, split
from shardcomp.ir.program import Value
from shardcomp.kernels.attention import attention
from shardcomp.kernels.dropout import OWN, SAME_SHARD, SHARED, Stream, dropout, dropped_attention, stream_for
from shardcomp.sharding.rules import factoring

CPU = torch.device("cpu")


class Given(Stream):
    """Keeps what a mask over all heads says, of which it has a part."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def keep(self, x: Tensor, p: float) -> Tensor:
        assert x.shape == self.kept.shape
        return self.kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    count = 200_000
    out = dropout(torch.ones(count, dtype=dtype), p, Stream(3, CPU))
    kept = out != 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    assert out[kept].unique().tolist() == [float(torch.tensor(1 / (1 - p), dtype=dtype))]
    assert out.dtype == dtype


def test_what_is_dropped_is_zero_whatever_it_was_and_all_may_be() -> None:
    stream = Stream(0, CPU)
    x = torch.full((50,), float("inf"))
    assert set(dropout(x, 0.5, stream).tolist()) == {0.0, float("inf")}
    assert (dropout(torch.ones(50), 1.0, stream) == 0).all()
    assert dropout(torch.ones(0, 3), 0.5, stream).shape == (0, 3)


def test_the_mask_does_not_depend_on_strides_and_the_gradient_passes_where_it_keeps() -> None:
    x = torch.randn(6, 8, dtype=torch.float64)
    turned = x.t().contiguous().t().requires_grad_()
    out = dropout(turned, 0.3, Stream(1, CPU))
    assert torch.equal(out, dropout(x, 0.3, Stream(1, CPU)))
    [gradient] = torch.autograd.grad(out, turned, x)
    torch.testing.assert_close(gradient, torch.where(out != 0, x / 0.7, 0.0))


def test_torchs_own_numbers_are_neither_used_nor_changed() -> None:
    q, k, v = operands()
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        outs.append(attention(q, k, v, dropout=0.5, random=Stream(0, CPU)))
        dropout(q, 0.5, Stream(0, CPU))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*outs)


BIAS = torch.linspace(-1, 1, 81, dtype=torch.float64).view(9, 9)
HIDING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": BIAS.view(1, 1, 9, 9) > -0.5},
    "floating": {"attn_mask": BIAS},
    "grouped, scaled": {"enable_gqa": True, "scale": 0.3},
}


@pytest.mark.parametrize("name", HIDING)
def test_scaled_attention_drops_as_torchs_does(name: str) -> None:
    q, k, v = operands(groups=2 if "grouped" in name else 6)
    kept = torch.rand((2, 6, 9, 9), generator=torch.Generator().manual_seed(0)) > 0.3
    got = dropped_attention(q, k, v, dropout_p=0.3, random=Given(kept), **HIDING[name])
    inputs: dict[str, Any] = dict(HIDING[name])
    if name == "bool":  # what torch's steps take is the mask's floating form
        inputs["attn_mask"] = torch.where(inputs["attn_mask"], 0.0, float("-inf")).to(q.dtype)
    expected, _ = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, dropout_p=0.3, dropout_mask=kept, **inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    for mine, torchs in zip(
        torch.autograd.grad(got, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", MASKS)
def test_attention_that_keeps_everything_is_attention(name: str) -> None:
    q, k, v = operands()
    kept = torch.ones((2, 6, 9, 9), dtype=torch.bool)
    got = attention(q, k, v, dropout=0.25, random=Given(kept), **MASKS[name])
    torch.testing.assert_close(got * 0.75, attention(q, k, v, **MASKS[name]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["causal", "padded left", "window", "bias", "all of them"])
def test_heads_that_drop_apart_and_are_joined_are_the_whole(name: str) -> None:
    q, k, v = operands()
    kept = torch.rand((2, 6, 9, 9), generator=torch.Generator().manual_seed(0)) > 0.3
    parts = []
    for rank in range(2):
        inputs: dict[str, Any] = dict(MASKS[name])
        if "sinks" in inputs:
            inputs["sinks"] = inputs["sinks"].chunk(2)[rank]
        own = [held.chunk(2, 1)[rank] for held in (q, k, v, kept)]
        parts.append(attention(*own[:3], dropout=0.3, random=Given(own[3]), **inputs))
    whole = attention(q, k, v, dropout=0.3, random=Given(kept), **MASKS[name])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-13)


def test_a_query_that_sees_no_key_gives_zero_with_finite_gradients() -> None:
    q, k, v = operands(groups=6)
    seen = torch.ones((9, 9), dtype=torch.bool)
    seen[:4] = False
    out = dropped_attention(q, k, v, seen, 0.5, random=Stream(0, CPU))
    assert (out[:, :, :4] == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


def call(target: Any, *shapes: tuple[int, ...]) -> fx.Node:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for node, shape in zip(nodes, shapes, strict=True):
        node.meta["value"] = Value(shape, torch.float32)
    actual = graph.call_function(target, tuple(nodes), {"random": SHARED})
    actual.meta["value"] = Value(shapes[0], torch.float32)
    return actual


def test_the_stream_is_shared_exactly_where_ranks_drop_from_the_same_numbers() -> None:
    node = call(dropout, (2, 6, 9, 8))
    assert [stream_for(node, at) for at in (REPLICATED, copied(4), split(1), split(3), split(2, 2))] == [
        SHARED,
        SHARED,
        OWN,
        OWN,
        SAME_SHARD,
    ]
    for target in (attention, dropped_attention):
        heads = call(target, *[(2, 6, 9, 8)] * 3)
        # Cut along what the values hold, each rank has all of the weights.
        assert [stream_for(heads, at) for at in (REPLICATED, split(1), split(3))] == [SHARED, OWN, SHARED]


def test_dropout_may_be_cut_anywhere_and_takes_no_partial_operand() -> None:
    rule = factoring(call(dropout, (2, 6, 8)))
    assert rule is not None
    assert rule.operands == rule.results and None not in rule.results[0] and not rule.linear
    heads = factoring(call(dropped_attention, *[(2, 6, 9, 8)] * 3))
    assert heads is not None and heads.results[0][1] is not None and heads.results[0][2] is None
