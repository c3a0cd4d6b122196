"""Schedules that split the backward, where parameters are put back in pieces before the gradients of weights are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import shardcomp
from shardcomp import presets
from shardcomp.policy.patterns import Entry, parse
from shardcomp.verification.verifier import verify
from support.families import tiny_config
from support.models import tiny

SIZE = 8
OPTIONS: dict[str, Any] = {"pipeline": 2, "data": 2, "schedule": "zero_bubble", "zero": 3, "precision": "fp64"}

Compute = Callable[["Layer", Tensor], Tensor]
READS: dict[str, Compute] = {
    "a square": lambda layer, x: functional.linear(x, layer.w * layer.w),
    "a product of two weights": lambda layer, x: functional.linear(x, layer.w @ layer.v),
    "a view of a weight": lambda layer, x: functional.linear(x, layer.w[: SIZE // 2].repeat(2, 1) * layer.v.t()),
    "a weight used twice": lambda layer, x: functional.linear(functional.linear(x, layer.w).sin() @ layer.v, layer.w),
    "a norm over two dimensions": lambda layer, x: layer.norm(x.unflatten(-1, (2, SIZE // 2))).flatten(-2),
    "layers that share a weight": lambda layer, x: functional.linear(layer.shared(x).sin(), layer.w),
}
"""What the gradients of weights read weights for."""
READS_NONE: dict[str, Compute] = {
    "products": lambda layer, x: functional.linear(x, layer.w) * torch.sigmoid(x @ layer.v),
    "a weight used twice side by side": lambda layer, x: functional.linear(x, layer.w).sin() * functional.linear(x, layer.w),
    "a scale": lambda layer, x: layer.root(x) @ (2 * layer.w),
}


class Layer(nn.Module):
    """`x + compute(layer, x)`."""

    def __init__(self, compute: Compute, shared: nn.Linear) -> None:
        super().__init__()
        self.compute = compute
        names = compute.__code__.co_names
        if "w" in names:
            self.w = nn.Parameter(torch.randn(SIZE, SIZE) / 3)
        if "v" in names:
            self.v = nn.Parameter(torch.randn(SIZE, SIZE) / 3)
        if "norm" in names:
            self.norm = nn.LayerNorm((2, SIZE // 2))
        if "root" in names:
            self.root = nn.RMSNorm(SIZE)
        if "shared" in names:
            self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.compute(self, x))


class Model(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = None
        self.embed = nn.Embedding(23, SIZE)
        shared = nn.Linear(SIZE, SIZE)
        self.layers = nn.ModuleList(Layer(compute, shared) for _ in range(4))
        self.head = nn.Linear(SIZE, 23, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return found


UNITS = tuple(Entry(parse(path), word) for path, word in (("embed", "first"), ("layers.*", "layer"), ("head", "last")))


def policy(**options: Any) -> shardcomp.Policy:
    return shardcomp.Policy("other", (), UNITS, {**OPTIONS, **options})


def whole(lowered: Any) -> list[bool]:
    """By stage, whether its backward is not split."""
    return [any(unit.plan.whole_backward for unit in lowered.program.in_stages((n,))) for n in range(lowered.program.stages)]


@pytest.mark.grid
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("what", READS)
def test_a_stage_is_right_whose_gradients_read_its_weights(what: str, recompute: str) -> None:
    chosen = policy(recompute=recompute)
    assert verify(Model(READS[what]), chosen, kinds=("causal",)).ok
    lowered = shardcomp.lower(Model(READS[what]), chosen, seq=8)
    assert whole(lowered) == [False, True]  # nothing comes before the first
    assert [each.what for each in lowered.program.degraded if each.what.startswith("stage")] == ["stage 1"]


@pytest.mark.parametrize("what", READS_NONE)
def test_a_stage_is_split_whose_gradients_read_none(what: str) -> None:
    assert verify(Model(READS_NONE[what]), policy(), kinds=("causal",)).ok
    assert whole(shardcomp.lower(Model(READS_NONE[what]), policy(), seq=8)) == [False, False]


def test_other_schedules_and_parameters_that_stay_change_nothing() -> None:
    for options in ({"zero": 2}, {"schedule": "interleaved"}):
        lowered = shardcomp.lower(Model(READS["a square"]), policy(**options), seq=8)
        assert not any(whole(lowered))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom"])
def test_the_usual_models_are_split(kind: str, tensor: int) -> None:
    config = tiny(num_hidden_layers=4) if kind == "llama" else tiny_config(kind)
    model = presets.build(config)
    lowered = shardcomp.lower(model, shardcomp.Policy.for_model(model.config.model_type, **OPTIONS, tensor=tensor), seq=8)
    assert not any(whole(lowered))


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("what", ["a weight used twice", "layers that share a weight"])
def test_a_weight_used_behind_its_own_result_is_right_where_it_stays_gathered(what: str, zero: int) -> None:
    assert verify(Model(READS[what]), policy(zero=zero), kinds=("causal",)).ok
    assert whole(shardcomp.lower(Model(READS[what]), policy(zero=zero), seq=8)) == [False, True]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_of_calls_with_several_results_have_their_gradients(recompute: str) -> None:
    chosen = shardcomp.Policy.load("llama", **OPTIONS, recompute=recompute)
    assert verify(tiny(num_hidden_layers=4), chosen, kinds=("causal",)).ok
    lowered = shardcomp.lower(tiny(num_hidden_layers=4), chosen, seq=8)
    assert "add_rms_norm(" in lowered.listing()
    assert not any(whole(lowered))
