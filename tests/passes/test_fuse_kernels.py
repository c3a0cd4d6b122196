"""Kernels are put where a model computes what they compute, however it writes it, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import shardcomp
from measure.substitution import compared
from shardcomp.errors import PolicyError
from shardcomp.kernels.counts import kernel_counts
from shardcomp.lowered import Lowered
from shardcomp.policy.patterns import Entry, parse
from shardcomp.verification.verifier import verify
from support.families import tiny_config
from support.listings import before_and_after, lower_gated_model, pinned_torch
from support.models import tiny
from support.structures import Sizes, Structure, build
from support.structures import policy as structured_policy

H, HEADS, D = 24, 3, 8
Compute = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """Adds `compute(layer, x)` to x, and something that no kernel computes, so that every weight is used."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.w = nn.Parameter(torch.rand(H) + 0.5)
        self.v = nn.Parameter(torch.rand(H) - 0.5)
        self.first, self.second, self.out = (nn.Linear(H, H, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.compute(self, x)) + (self.first(self.second(x)) + self.v) * self.w


class Model(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = None
        self.embed = nn.Embedding(23, H)
        self.layers = nn.ModuleList(Layer(compute) for _ in range(2))
        self.head = nn.Linear(H, 23, bias=False)

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


def lowered(compute: Compute, **options: Any) -> Lowered:
    return shardcomp.lower(Model(compute), shardcomp.Policy("other", (), UNITS, options), seq=8)


def counts(found: Lowered) -> dict[str, int]:
    """Kernel -> how many of it each layer has, but for the loss."""
    layers = [unit for unit in found.program.units if unit.kind == "layer"]
    return {name: entry["count"] // len(layers) for name, entry in kernel_counts(layers).items()}


def scaled(x: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def tables(x: Tensor, size: int = D) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * (1 + torch.arange(size // 2, device=x.device)) / 7
    angles = torch.cat((angles, angles), -1)[None, None]
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def half_turned(x: Tensor, sign: int = -1) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second if sign > 0 else -second, first), -1)


def roped(layer: Layer, x: Tensor, turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    cos, sin = tables(x)
    return merged(turn(heads(layer.first(x)), cos, sin) - turn(heads(layer.second(x)), cos, sin).tanh())


def sharing(layer: Layer, x: Tensor) -> Tensor:
    wide = scaled(x)
    return layer.w * wide.to(x.dtype) + wide.sin().to(x.dtype)


def factor_used(layer: Layer, x: Tensor) -> Tensor:
    factor = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return layer.w * (x.float() * factor).to(x.dtype) + factor.sin().to(x.dtype)


def normed_twice(layer: Layer, x: Tensor) -> Tensor:
    once = layer.w * scaled(x).to(x.dtype)
    return functional.silu(layer.first(layer.w * scaled(once).to(x.dtype))) * layer.second(once)


def two_norms_of_a_sum(layer: Layer, x: Tensor) -> Tensor:
    total = x + layer.first(x)
    return layer.w * scaled(total).to(x.dtype) - layer.second(layer.v * scaled(total).to(x.dtype))


def gated_twice(layer: Layer, x: Tensor) -> Tensor:
    gate = functional.silu(layer.first(x)) * layer.second(x)
    return functional.silu(gate) * layer.second(gate)


def turned_twice(layer: Layer, x: Tensor) -> Tensor:
    cos, sin = tables(x)
    queries, keys = heads(layer.first(x)), heads(layer.second(x))
    for _ in range(2):
        queries, keys = (h * cos + half_turned(h) * sin for h in (queries, keys))
    return merged(queries - keys.tanh())


def written_out(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def two_dtypes(layer: Layer, x: Tensor) -> Tensor:
    made = layer.w.float() * scaled(x)
    return made.to(x.dtype) + made.exp().sigmoid().to(x.dtype)


FOUND: dict[str, tuple[Compute, dict[str, int]]] = {
    "a norm": (lambda layer, x: layer.w * scaled(x).to(x.dtype), {"rms_norm": 1}),
    "a norm rounded last": (lambda layer, x: (layer.w.float() * scaled(x)).to(x.dtype), {"rms_norm": 1}),
    "a norm with 1 + w": (lambda layer, x: ((1.0 + layer.w.float()) * scaled(x)).to(x.dtype), {"rms_norm": 1}),
    "a norm without a weight": (lambda layer, x: scaled(x).to(x.dtype), {"rms_norm": 1}),
    "a norm of a sum": (lambda layer, x: layer.w * scaled(x + layer.first(x)).to(x.dtype), {"add_rms_norm": 1}),
    "a norm of a sum of three": (
        lambda layer, x: layer.w * scaled(x + layer.first(x) + layer.second(x)).to(x.dtype),
        {"rms_norm": 1},
    ),
    "torch's norm": (lambda layer, x: functional.rms_norm(x, (H,), layer.w, 1e-5), {"rms_norm": 1}),
    "a norm of squares by product": (
        lambda layer, x: layer.w * (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, True) + 1e-6)).to(x.dtype),
        {"rms_norm": 1},
    ),
    "a layer norm": (lambda layer, x: functional.layer_norm(x, (H,), layer.w, layer.v), {"layer_norm": 1}),
    "a norm of a norm": (lambda layer, x: layer.w * scaled(layer.v * scaled(x).to(x.dtype)).to(x.dtype), {"rms_norm": 2}),
    "a norm of a layer norm": (
        lambda layer, x: functional.layer_norm(layer.w * scaled(x).to(x.dtype), (H,), layer.w, layer.v),
        {"rms_norm": 1, "layer_norm": 1},
    ),
    "an MLP that norms its gate's operand again": (normed_twice, {"rms_norm": 2, "swiglu": 1}),
    "two norms of one sum": (two_norms_of_a_sum, {"add_rms_norm": 1, "rms_norm": 1}),
    "silu": (lambda layer, x: functional.silu(layer.first(x)) * layer.second(x), {"swiglu": 1}),
    "a gate that is gated": (gated_twice, {"swiglu": 2}),
    "silu of a clamped gate": (
        lambda layer, x: functional.silu(layer.first(x).clamp(max=0.1)) * (layer.second(x).clamp(-0.1, 0.1) + 1),
        {"swiglu": 1},
    ),
    "normal values that are used elsewhere": (sharing, {"rms_norm": 1}),
    "a result in float32 that is used in two dtypes": (two_dtypes, {"rms_norm": 1}),
    "gelu": (lambda layer, x: functional.gelu(layer.first(x)) * layer.second(x), {"geglu": 1}),
    "gelu by tanh": (lambda layer, x: layer.second(x) * functional.gelu(layer.first(x), approximate="tanh"), {"geglu": 1}),
    "halves turned": (
        lambda layer, x: roped(layer, x, lambda h, cos, sin: h * cos + half_turned(h) * sin),
        {"rotary": 1},
    ),
    "halves turned, in float32": (
        lambda layer, x: roped(layer, x, lambda h, cos, sin: (h.float() * cos + half_turned(h.float()) * sin).to(h.dtype)),
        {"rotary": 1},
    ),
    "what is turned already": (turned_twice, {"rotary": 2}),
}
"""What is computed, and the kernels of a layer."""

MISSED: dict[str, tuple[Compute, str]] = {
    "eps behind the root": (
        lambda layer, x: (layer.w * x.float() / (x.float().pow(2).mean(-1, True).sqrt() + 1e-5)).to(x.dtype),
        "in float64",
    ),
    "a mean over the sequence": (
        lambda layer, x: (layer.w * (x.float() * torch.rsqrt(x.float().pow(2).mean(1, True) + 1e-5))).to(x.dtype),
        "not taken over the last dimension",
    ),
    "a variance without its mean": (
        lambda layer, x: (layer.w * (x.float() * torch.rsqrt(x.float().var(-1, keepdim=True) + 1e-5))).to(x.dtype),
        "in float64",
    ),
    "a sum of squares": (
        lambda layer, x: (layer.w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, True) + 1e-5))).to(x.dtype),
        "in float64",
    ),
    "a factor that is used elsewhere": (factor_used, "used elsewhere"),
    "silu written out": (lambda layer, x: layer.second(x) * written_out(layer.first(x)), "rounds elsewhere"),
    "relu for silu": (lambda layer, x: functional.relu(layer.first(x)) * layer.second(x), "in float64"),
    "the other sign": (
        lambda layer, x: roped(
            layer, x, lambda h, cos, sin: h * cos + torch.cat((h.chunk(2, -1)[1], -h.chunk(2, -1)[0]), -1) * sin
        ),
        "in float64",
    ),
    "a half turned without a sign": (
        lambda layer, x: roped(layer, x, lambda h, cos, sin: h * cos + half_turned(h, 1) * sin),
        "in float64",
    ),
    "a rotation that is rounded elsewhere": (
        lambda layer, x: roped(
            layer, x, lambda h, cos, sin: (h.float() * cos).to(h.dtype) + (half_turned(h.float()) * sin).to(h.dtype) * 1.0
        ),
        "",
    ),
    "one rotation alone": (
        lambda layer, x: merged(heads(layer.first(x)) * tables(x)[0] + half_turned(heads(layer.first(x))) * tables(x)[1]),
        "",
    ),
}
"""What is computed, and a part of the reason why no kernel is put there; empty where none need be given."""


@pytest.mark.parametrize("name", FOUND)
def test_what_a_kernel_computes_becomes_the_kernel(name: str) -> None:
    compute, expected = FOUND[name]
    found = lowered(compute, precision="bf16")
    assert counts(found) == expected
    assert not found.program.missed


@pytest.mark.parametrize("name", MISSED)
def test_what_only_looks_alike_is_left_alone(name: str) -> None:
    compute, reason = MISSED[name]
    found = lowered(compute, precision="bf16")
    assert counts(found) == {}, found.listing(after="substitute")
    assert not reason or any(reason in miss.reason for miss in found.program.missed), found.program.missed


@pytest.mark.parametrize("name", [*FOUND, *MISSED])
def test_the_numbers_stay_what_they_were(name: str) -> None:
    compute = (FOUND | MISSED)[name][0]  # type: ignore[operator]
    assert verify(Model(compute), shardcomp.Policy("other", (), UNITS, {"precision": "fp64"}), kinds=("causal",)).ok


def test_a_weight_that_is_added_leaves_the_norm_without_one() -> None:
    found = lowered(lambda layer, x: layer.w + scaled(x).to(x.dtype), precision="bf16")
    assert counts(found) == {"rms_norm": 1}
    assert "rms_norm(hidden, eps=" in found.listing(after="substitute")


def test_one_rounding_is_what_numerics_fp32_means() -> None:
    found = lowered(lambda layer, x: layer.w * scaled(x).to(x.dtype), precision="bf16", numerics="fp32")
    assert counts(found) == {"rms_norm": 1} and "round_first" not in found.listing()


def test_numerics_fp32_takes_what_rounds_elsewhere() -> None:
    def compute(layer: Layer, x: Tensor) -> Tensor:
        square = x.pow(2).float()  # rounded to the dtype of x, as no kernel does it
        return layer.w * (x.float() * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    kept = lowered(compute, precision="bf16")
    assert counts(kept) == {}
    [miss] = kept.program.missed
    assert miss.where == "layers.*" and "rounds elsewhere" in miss.reason and "numerics = fp32" in miss.reason
    assert counts(lowered(compute, precision="bf16", numerics="fp32")) == {"rms_norm": 1}


USUAL = {"rms_norm": 1, "add_rms_norm": 1, "rotary": 1, "swiglu": 1}
FAMILIES: dict[str, dict[str, int]] = {
    "llama": USUAL,
    "mistral": USUAL,
    "qwen2": USUAL,
    "qwen3": {**USUAL, "rms_norm": 3},
    "gemma": {"rms_norm": 1, "add_rms_norm": 1, "rotary": 1, "geglu": 1},
    "gemma2": {"rms_norm": 3, "add_rms_norm": 1, "rotary": 1, "geglu": 1},
    "phi3": USUAL,
    "gpt_neox": {"layer_norm": 2, "rotary": 1},
    "gptj": {"layer_norm": 1, "rotary": 1},
    "cohere": {"layer_norm": 1, "rotary": 1, "swiglu": 1},
    "olmo2": {"rms_norm": 4, "rotary": 1, "swiglu": 1},
}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_gets_its_kernels_by_structure(kind: str, precision: str) -> None:
    found = shardcomp.lower(tiny_config(kind), shardcomp.Policy.load("auto", precision=precision), seq=16)
    own = any(each.what == "attention" for each in found.program.degraded)
    assert not own or kind == "gptj"  # which calls transformers' attention interface in newer releases
    assert counts(found) == FAMILIES[kind] | ({} if own else {"attention": 1})
    assert not found.program.missed


def test_a_norm_over_features_that_ranks_share_stays_in_steps() -> None:
    found = shardcomp.lower(tiny_config("olmo2"), shardcomp.Policy.load("auto", tensor=2), seq=16)
    assert counts(found) == {**FAMILIES["olmo2"], "rms_norm": 2, "attention": 1}
    assert {miss.where for miss in found.program.missed} == {f"model.layers.*.self_attn.{x}_norm" for x in "qk"}
    assert all("tensor = 2 splits the features" in miss.reason for miss in found.program.missed)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"kernels": "-rotary"}, {"rotary"}),
        ({"kernels": ["-swiglu", "-rotary"]}, {"swiglu", "rotary"}),
        ({"kernels": "none"}, set(USUAL)),
    ],
)
def test_kernels_are_switched_off_by_name(options: dict[str, Any], gone: set[str]) -> None:
    found = shardcomp.lower(tiny(), shardcomp.Policy.load("llama", **options), seq=16)
    assert counts(found) == {name: count for name, count in USUAL.items() if name not in gone} | {"attention": 1}
    assert not found.program.missed


def test_a_norm_keeps_its_addition_apart_where_that_is_asked_for() -> None:
    found = shardcomp.lower(tiny(), shardcomp.Policy.load("llama", kernels="-add_rms_norm"), seq=16)
    assert counts(found) == {"rms_norm": 2, "rotary": 1, "swiglu": 1, "attention": 1}


@pytest.mark.parametrize("value", ["rotary", "-rotery", ["-rotary", "all"], "", 3, "-attention"])
def test_a_kernel_that_cannot_be_left_out_is_refused(value: Any) -> None:
    with pytest.raises(PolicyError, match="kernels = .*: use all, none, or a list of -rms_norm"):
        shardcomp.Policy.load("llama", kernels=value)
    with pytest.raises(PolicyError, match="numerics = .*use hf or fp32"):
        shardcomp.Policy.load("llama", numerics="bf16")


def own(tmp_path: Path, kernels: str) -> Path:
    shipped = Path(shardcomp.__file__).parent / "policies" / "llama.toml"
    path = tmp_path / "own.toml"
    path.write_text(shipped.read_text() + f"\n[kernels]\n{kernels}\n")
    return path


def test_a_policy_that_expects_more_kernels_than_there_are_is_refused(tmp_path: Path) -> None:
    expected = 'rms_norm = 3\nadd_rms_norm = "1 per layer"\nrotary = "1 per layer"\nattention = 2'
    assert shardcomp.lower(tiny(), own(tmp_path, expected), seq=16)
    with pytest.raises(PolicyError, match=r"\[kernels\] expects geglu = 2, but 0 can be placed"):
        shardcomp.lower(tiny(), own(tmp_path, 'geglu = "1 per layer"'), seq=16)
    with pytest.raises(PolicyError, match=r"expects swiglu = 2, .*nearest miss is model.layers.\*.mlp: it is no"):
        shardcomp.lower(tiny(hidden_act="relu"), own(tmp_path, 'swiglu = "1 per layer"'), seq=16)
    policy = shardcomp.Policy.load(own(tmp_path, 'rotary = "1 per layer"'), kernels="-rotary")
    assert shardcomp.lower(tiny(), policy, seq=16)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rotery = 3", "did you mean 'rotary'"),
        ('rotary = "one"', 'use a number, such as 32, or "1 per layer"'),
        ("rotary = -1", "use a"),
    ],
)
def test_an_expectation_that_makes_no_sense_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as refused:
        shardcomp.Policy.load(own(tmp_path, line))
    assert "line " in str(refused.value)


@pytest.mark.parametrize("norm", ["rms", "rms_one", "rms_plain", "layer", "layer_biased"])
@pytest.mark.parametrize("positions", ["rotary", "partial", "interleaved"])
def test_models_that_no_library_has_get_theirs(norm: str, positions: str) -> None:
    structure = Structure(norm=norm, positions=positions, activation="gelu_tanh")
    sizes = Sizes()
    found = shardcomp.lower(build(structure, sizes), structured_policy(structure, precision="bf16"), seq=16)
    norms = {"rms_norm": 1, "add_rms_norm": 1} if norm.startswith("rms") else {"layer_norm": 2}
    assert counts(found) == {**norms, "rotary": 1, "geglu": 1, "attention": 1}
    assert not found.program.missed


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_bits_that_are_measured_are_those_of_the_model(precision: str) -> None:
    found = compared("gemma", precision)
    assert {"rms_norm", "add_rms_norm", "geglu", "rotary"} == found.keys()
    assert all(share == 1 and apart == 0 for _, share, apart in found.values())


BEFORE = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden = self.fan_out(hidden)
        linear_2: f32[b, s, 12] = linear(hidden, w.packed.weight.gate)
        linear_3: f32[b, s, 12] = linear(hidden, w.packed.weight.up)
        silu_1: f32[b, s, 12] = silu(linear_2)
        mul_1: f32[b, s, 12] = silu_1 * linear_3
        down: f32[b, s, 8] = linear(mul_1, w.down.weight)
        add_1: f32[b, s, 8] = hidden + down
        return add_1
"""

EXPECTED = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden = self.fan_out(hidden)
        linear_2: f32[b, s, 12] = linear(hidden, w.packed.weight.gate)
        linear_3: f32[b, s, 12] = linear(hidden, w.packed.weight.up)
        swiglu_1: f32[b, s, 12] = swiglu(linear_2, linear_3)
        down: f32[b, s, 8] = linear(swiglu_1, w.down.weight)
        add_1: f32[b, s, 8] = hidden + down
        return add_1
"""


@pinned_torch
def test_a_gate_and_its_factor_become_one_kernel() -> None:
    lowered = lower_gated_model()
    assert before_and_after(lowered, "fuse_kernels", "Layer") == (BEFORE, EXPECTED)
