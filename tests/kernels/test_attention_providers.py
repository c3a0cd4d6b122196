"""Attention by the provider that a policy names: the adapter of xformers against the reference, with its operator in place of
which stands what its documentation says; and that a named provider which cannot run is refused before anything is allocated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.test_attention import MASKS, by_definition, operands
from torch import Tensor

import shardcomp
from shardcomp import KernelError, PlanError
from shardcomp.kernels import attention_providers
from shardcomp.kernels.attention import attention
from shardcomp.materialize import allocate, weights_of
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny

PACKED = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 7, 7]])
CASES: dict[str, dict[str, Any]] = {
    **{
        name: MASKS[name]
        for name in ("causal", "all", "scaled", "window", "padded left", "padded everywhere", "bias", "positions")
    },
    "packed": {"q_segment": PACKED, "k_segment": PACKED},
    "packed, all": {"q_segment": PACKED, "k_segment": PACKED, "causal": False},
    "packed, window": {"q_segment": PACKED, "k_segment": PACKED, "window": 2},
    "two tensors of segments": MASKS["packed"] | {"k_segment": MASKS["packed"]["q_segment"].clone()},
}


class LowerTriangularMask:
    """A query sees its own and earlier keys."""

    def seen(self, q: int, k: int) -> Tensor:
        return torch.ones((q, k), dtype=torch.bool).tril()


@dataclass
class BlockDiagonalMask:
    """Sequences one behind the other in a batch of one; a query sees the keys of its own."""

    lengths: list[int]
    causal: bool = False
    window: int | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], *, device: torch.device) -> BlockDiagonalMask:
        return cls(q_seqlen)

    def make_causal(self) -> BlockDiagonalMask:
        return BlockDiagonalMask(self.lengths, True)

    def make_local_attention(self, window_size: int) -> BlockDiagonalMask:
        """Query i sees the keys with an index above i - window_size and up to i."""
        assert self.causal
        return BlockDiagonalMask(self.lengths, True, window_size)

    def seen(self, q: int, k: int) -> Tensor:
        assert q == k == sum(self.lengths)
        number = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        back = torch.arange(q)[:, None] - torch.arange(k)
        seen = number[:, None] == number
        seen = seen & (back >= 0) if self.causal else seen
        return seen if self.window is None else seen & (back < self.window)


class Stand:
    """What `xformers.ops` says that it does: [b, s, n, d] operands with as many key heads as query heads."""

    LowerTriangularMask = LowerTriangularMask
    fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))

    def __init__(self) -> None:
        self.masks: list[Any] = []

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        self.masks.append(attn_bias)
        assert query.shape[2] == key.shape[2] == value.shape[2] and query.shape[0] == key.shape[0] and p == 0.0
        q, k, v = (held.transpose(1, 2) for held in (query, key, value))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == scores.shape and attn_bias.stride(-2) % 8 == 0 and attn_bias.dtype == q.dtype
            scores = scores + attn_bias
        elif attn_bias is not None:
            scores = scores.masked_fill(~attn_bias.seen(*scores.shape[-2:]), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    package, actual = ModuleType("xformers"), Stand()
    package.ops = actual  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", actual)  # type: ignore[arg-type]
    return actual


@pytest.mark.parametrize("name", CASES)
def test_what_xformers_is_handed_computes_the_definition(name: str, stand: Stand) -> None:
    q, k, v = operands()
    got, expected = attention(q, k, v, provider="xformers", **CASES[name]), attention(q, k, v, **CASES[name])
    torch.testing.assert_close(got.detach(), by_definition(q, k, v, **CASES[name]).detach(), rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(each, (q, k, v), weight) for each in (got, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    [mask] = stand.masks
    whole = ("padded left", "padded everywhere", "bias", "positions", "two tensors of segments")
    assert isinstance(mask, Tensor) == (name in whole), "a mask of s x s where there need be none, or none where it must be"


def test_a_segment_in_several_pieces_is_refused_by_xformers(stand: Stand) -> None:
    torn = torch.tensor([[0, 1, 0, 1, 1, 1, 2, 2, 2]]).expand(2, -1)
    with pytest.raises(KernelError, match="a segment lies in several runs"):
        attention(*operands(), q_segment=torn, k_segment=torn, provider="xformers")
    assert not stand.masks


@pytest.mark.parametrize("name", MASKS)
def test_eager_attention_is_the_definition(name: str) -> None:
    q, k, v = operands()
    got = attention(q, k, v, provider="eager", **MASKS[name])
    torch.testing.assert_close(got, by_definition(q, k, v, **MASKS[name]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("provider", "settings", "message"),
    [
        ("sdpa:cudnn", {"softcap": 2.0}, "cannot take softcap: use attention = sdpa, eager"),
        ("xformers", {"sinks": torch.ones(6), "softcap": 1.0}, "cannot take sinks, softcap: use attention = sdpa, eager"),
        ("flash3", {"window": 3}, "cannot take window: use attention = sdpa, sdpa:cudnn, xformers, eager"),
        ("flash3", {"dropout": 0.1}, "cannot take dropout: use attention = sdpa, sdpa:cudnn, xformers, eager"),
        ("flash3", {}, "flash3 runs on a GPU only, and this is cpu: use attention = sdpa or eager"),
        ("sdpa:cudnn", {}, "sdpa:cudnn runs on a GPU only, and this is cpu"),
        ("xformers", {}, r"attention = xformers: .*: pip install shardcomp\[xformers\], or use attention = sdpa"),
    ],
)
def test_what_a_provider_cannot_do_is_refused(
    provider: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(KernelError, match=message):
        attention(*operands(), provider=provider, **settings)


def test_a_probe_tells_what_stood_in_its_way() -> None:
    def call() -> Tensor:
        torch.warnings.warn("the kernel wants sm_90", stacklevel=1)  # type: ignore[attr-defined]
        raise RuntimeError("No available kernel")

    with pytest.raises(KernelError, match="the kernel wants sm_90; No available kernel. Use attention = sdpa"):
        attention_providers.probe([call])


def lowered(provider: str, **options: Any) -> Any:
    policy = shardcomp.Policy.load("llama", precision="fp64", attention=provider, **options)
    return shardcomp.lower(tiny(), policy, seq=8)


@pytest.mark.parametrize("provider", ["flash3", "sdpa:cudnn", "xformers"])
def test_a_plan_whose_attention_cannot_run_is_refused_before_anything_is_allocated(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    low = lowered(provider, tensor=2)
    assert f'provider="{provider}"' in low.listing().replace("'", '"')
    mine, plain = low.report(), lowered("auto", tensor=2).report()
    assert {**mine, "policy": None} == {**plain, "policy": None}

    def never(*_: Any) -> Tensor:
        raise AssertionError("a weight was read")

    with pytest.raises(KernelError, match=f"attention = {provider}"):
        run_ranks(2, lambda rank: allocate(low, never))


@pytest.mark.parametrize("provider", ["eager", "xformers"])
def test_a_plan_with_a_named_attention_trains_alike(provider: str, stand: Stand) -> None:
    tokens = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(0))

    def loss(name: str) -> Tensor:
        low = lowered(name, tensor=2)
        return run_ranks(2, lambda rank: allocate(low, weights_of(low)).train_step(input_ids=tokens, labels=tokens).loss)[0]

    torch.testing.assert_close(loss(provider), loss("sdpa"), rtol=1e-12, atol=0)
    assert bool(stand.masks) == (provider == "xformers")


@pytest.mark.parametrize("provider", ["eager", "sdpa"])
def test_a_model_that_computes_its_attention_itself_has_no_provider(provider: str) -> None:
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(PlanError, match=f"attention = {provider}, but the model computes its attention itself"):
        shardcomp.lower(config, shardcomp.Policy.load("auto", attention=provider), seq=8)
