"""The reference of attention against its definition, against HuggingFace's SDPA, and at its edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shardcomp.ir.program import Value
from shardcomp.kernels.attention import RECORDED, attention
from shardcomp.sharding.rules import factoring


def operands(dtype: torch.dtype = torch.float64, heads: int = 6, groups: int = 2, length: int = 9) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 4))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_definition(q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> Tensor:
    """One query at a time, in float64, from the docstring alone."""
    b, n, length, d = q.shape
    rows = []
    for batch, head, i in itertools.product(range(b), range(n), range(length)):
        shared = head * k.shape[1] // n
        scores, values = [], []
        for j in range(k.shape[2]):
            at, of = (
                position if inputs.get(name) is None else int(inputs[name][batch, position])
                for name, position in (("q_position", i), ("k_position", j))
            )
            seen = not inputs.get("causal", True) or of <= at
            seen &= inputs.get("window") is None or at - of < inputs["window"]
            if inputs.get("q_segment") is not None:
                seen &= bool(inputs["q_segment"][batch, i] == inputs["k_segment"][batch, j])
            if inputs.get("key_mask") is not None:
                seen &= bool(inputs["key_mask"][batch, j])
            if not seen:
                continue
            score = (q[batch, head, i] @ k[batch, shared, j]) * inputs.get("scale", d**-0.5)
            if inputs.get("softcap") is not None:
                score = inputs["softcap"] * torch.tanh(score / inputs["softcap"])
            if inputs.get("bias") is not None:
                score = score + inputs["bias"].expand(b, n, length, k.shape[2])[batch, head, i, j]
            scores.append(score)
            values.append(v[batch, shared, j])
        if inputs.get("sinks") is not None and scores:
            scores.append(inputs["sinks"][head])
            values.append(torch.zeros_like(v[0, 0, 0]))
        weights = torch.softmax(torch.stack(scores), 0) if scores else None
        rows.append(torch.stack(values).T @ weights if weights is not None else torch.zeros_like(v[0, 0, 0]))
    return torch.stack(rows).view(b, n, length, -1)


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "scaled": {"scale": 0.3},
    "window": {"window": 3},
    "padded left": {"key_mask": torch.arange(9).expand(2, -1) >= torch.tensor([[4], [0]])},
    "padded everywhere": {"key_mask": torch.zeros((2, 9), dtype=torch.bool), "causal": False},
    "packed": {name: torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2]]).expand(2, -1) for name in ("q_segment", "k_segment")},
    "positions": {name: torch.tensor([[3, 1, 0, 2, 4, 5, 8, 7, 6]]).expand(2, -1) for name in ("q_position", "k_position")},
    "bias": {"bias": torch.linspace(-1, 1, 81, dtype=torch.float64).view(1, 1, 9, 9)},
    "soft-cap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 6, dtype=torch.float64)},
}
MASKS["all of them"] = {**{k: v for name in MASKS for k, v in MASKS[name].items() if k != "causal"}, "causal": True}
MASKS["all of them"]["key_mask"] = MASKS["padded left"]["key_mask"]


@pytest.mark.parametrize("name", MASKS)
def test_the_reference_and_its_gradients_are_the_definition(name: str) -> None:
    q, k, v = operands()
    got, expected = attention(q, k, v, **MASKS[name]), by_definition(q, k, v, **MASKS[name])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if not expected.requires_grad:
        expected = expected + 0 * (q.sum() + k.sum() + v.sum())
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), weight),
        torch.autograd.grad(expected, (q, k, v), weight, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["padded left", "padded everywhere"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"sinks": torch.ones(6, dtype=torch.float64)}], ids=str)
def test_a_query_that_sees_no_key_gives_zero_and_takes_no_gradient(name: str, extra: dict[str, Any]) -> None:
    q, k, v = operands()
    mask = {"key_mask": MASKS[name]["key_mask"]}
    out = attention(q, k, v, **mask, **extra)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    blind = slice(0, 4) if name == "padded left" else slice(0, 9)
    assert (out[0, :, blind] == 0).all() and (gradients[0][0, :, blind] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_plain_causal_attention_equals_huggingface_bit_by_bit(dtype: torch.dtype, groups: int) -> None:
    q, k, v = operands(dtype, groups=groups)
    v = k * 2
    module = nn.Module()
    module.num_key_value_groups = 6 // groups
    expected = sdpa_attention_forward(module, q, k, v, None, scaling=0.3)[0].transpose(1, 2)
    assert torch.equal(attention(q, k, v, scale=0.3), expected)


def test_heads_need_not_be_contiguous_and_a_batch_may_be_empty() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands())
    torch.testing.assert_close(attention(q, k, v, window=2), attention(*operands(), window=2))
    assert attention(q[:0], k[:0], v[:0], key_mask=torch.ones((0, 9), dtype=torch.bool)).shape == (0, 6, 9, 4)


def test_a_window_without_causality_is_refused() -> None:
    with pytest.raises(ValueError, match="causal=True"):
        attention(*operands(), causal=False, window=3)


@pytest.mark.parametrize("name", ["causal", "padded left", "all of them"])
def test_the_recorded_operator_is_the_function(name: str) -> None:
    inputs = [t.detach() for t in operands()]
    torch.library.opcheck(RECORDED, inputs, MASKS[name], test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(RECORDED(*inputs, **MASKS[name]), attention(*inputs, **MASKS[name]))


def test_a_head_may_be_cut_and_a_broadcast_bias_may_not() -> None:
    graph = fx.Graph()
    shapes = {"q": (2, 6, 9, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 4), "mask": (2, 9), "bias": (1, 6, 9, 9)}
    nodes = {name: graph.placeholder(name) for name in shapes}
    for name, node in nodes.items():
        node.meta["value"] = Value(shapes[name], torch.float32)
    call = graph.call_function(
        attention, (nodes["q"], nodes["k"], nodes["v"]), {"key_mask": nodes["mask"], "bias": nodes["bias"]}
    )
    call.meta["value"] = Value((2, 6, 9, 4), torch.float32)
    rule = factoring(call)
    assert rule is not None
    q, k, v, mask, bias = rule.operands
    assert q[1] == k[1] == v[1] == bias[1] == rule.results[0][1] is not None
    assert q[0] == mask[0] == rule.results[0][0] is not None and bias[0] is None
    assert q[2:] == (None, None) and mask[1] is None


@pytest.mark.parametrize("name", ["padded left", "window", "bias", "all of them"])
def test_heads_computed_apart_and_joined_are_the_whole(name: str) -> None:
    q, k, v = operands()
    parts = []
    for rank in range(2):
        inputs = {key: held for key, held in MASKS[name].items()}
        if "sinks" in inputs:
            inputs["sinks"] = inputs["sinks"].chunk(2)[rank]
        parts.append(attention(q.chunk(2, 1)[rank], k.chunk(2, 1)[rank], v.chunk(2, 1)[rank], **inputs))
    torch.testing.assert_close(torch.cat(parts, 1), attention(q, k, v, **MASKS[name]), rtol=0, atol=1e-13)
