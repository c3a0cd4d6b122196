"""Decoder-only language models put together from independent choices, and the policy of each: what no library is made of.

`Structure` names the choices, `Sizes` the dimensions, `build` makes the model of both with weights of its own, and `policy`
says how it splits. Nothing here knows the compiler but for the words of a policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import shardcomp
from shardcomp.policy.patterns import Entry, parse

WINDOW = 7
POSITIONS = 64

CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("rms", "layer", "layer_biased", "rms_one", "rms_plain"),
    "norm_place": ("pre", "post", "both"),
    "block": ("sequential", "parallel", "parallel_one_norm"),
    "attention": ("interface", "bypass"),
    "projections": ("separate", "packed", "heads_chunked", "heads_indexed", "groups"),
    "transposed": (False, True),
    "qk_norm": ("none", "head", "each_head", "all"),
    "attention_bias": ("none", "qkv", "all"),
    "positions": ("rotary", "partial", "interleaved", "scaled", "learned", "alibi", "none"),
    "mask": ("full", "window", "alternating"),
    "score_softcap": (False, True),
    "logit_softcap": (False, True),
    "embedding_scale": (False, True),
    "attention_scale": (False, True),
    "residual_scale": (False, True),
    "mlp": ("gated", "gated_packed", "plain"),
    "activation": ("silu", "gelu", "relu", "relu_squared", "gelu_tanh"),
    "mlp_bias": (False, True),
    "mlp_flat": (False, True),
    "tied": (False, True),
    "head_bias": (False, True),
    "loss": ("library", "sliced"),
}
"""Every choice and what it may be, the plainest first."""


@dataclass(frozen=True)
class Structure:
    """One of each of `CHOICES`.

    norm: rms_one multiplies with 1 + w, rms_plain with nothing. norm_place: on what a branch reads, on what it gives, or both.
    block: attention and MLP one behind the other, or both on the same input, with a norm each or one for both.
    attention: through transformers' interface, or by the model's own products and softmax.
    projections: q, k and v apart; [q; k; v]; [heads, 3, d], chunked or indexed; [groups, heads of a group + 2, d].
    qk_norm: over the features of a head, with one weight for all heads or one each; or over those of all heads.
    """

    norm: str = "rms"
    norm_place: str = "pre"
    block: str = "sequential"
    attention: str = "interface"
    projections: str = "separate"
    transposed: bool = False
    qk_norm: str = "none"
    attention_bias: str = "none"
    positions: str = "rotary"
    mask: str = "full"
    score_softcap: bool = False
    logit_softcap: bool = False
    embedding_scale: bool = False
    attention_scale: bool = False
    residual_scale: bool = False
    mlp: str = "gated"
    activation: str = "silu"
    mlp_bias: bool = False
    mlp_flat: bool = False
    tied: bool = False
    head_bias: bool = False
    loss: str = "library"

    def __str__(self) -> str:
        """Only what is not plain."""
        plain = Structure()
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)}
        return ", ".join(f"{name}={held}" for name, held in changed.items()) or "plain"


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model. `kv` divides `heads`."""

    hidden: int = 20
    layers: int = 2
    heads: int = 4
    kv: int = 2
    head_dim: int = 4
    intermediate: int = 24
    vocabulary: int = 61


class StructuredConfig(PretrainedConfig):
    model_type = "structured"

    def __init__(self, structure: Structure | None = None, sizes: Sizes | None = None, **given: Any) -> None:
        structure, sizes = structure or Structure(), sizes or Sizes()
        self.vocab_size, self.hidden_size, self.num_hidden_layers = sizes.vocabulary, sizes.hidden, sizes.layers
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = sizes.heads, sizes.kv, sizes.head_dim
        self.intermediate_size = sizes.intermediate
        windowed = {"full": (False, False), "window": (True, True), "alternating": (True, False)}[structure.mask]
        kinds = ("full_attention", "sliding_attention")
        self.layer_types = [kinds[windowed[i % 2]] for i in range(sizes.layers)]
        self.sliding_window = WINDOW if structure.mask != "full" else None
        self.attn_logit_softcapping = 2.0 if structure.score_softcap else None
        super().__init__(tie_word_embeddings=structure.tied, **given)


class Norm(nn.Module):
    """A norm of the last dimension. shape: its weight's, of which the last is that dimension."""

    def __init__(self, kind: str, *shape: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "rms_plain":
            self.weight = nn.Parameter(torch.empty(shape))
        if kind == "layer_biased":
            self.bias = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("layer"):
            bias = self.bias if self.kind == "layer_biased" else None
            if self.weight.dim() == 1:
                return functional.layer_norm(x, self.weight.shape, self.weight, bias, 1e-5)
            made = functional.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight
            return made if bias is None else made + bias
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.kind == "rms_plain":
            return wide.type_as(x)
        return (wide * (1.0 + self.weight.float())).type_as(x) if self.kind == "rms_one" else self.weight * wide.type_as(x)


class Turned(nn.Module):
    """A linear layer whose weight is stored [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight
        rows = x.view(-1, x.shape[-1])
        return torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], -1)


def linear(structure: Structure, inputs: int, outputs: int, bias: bool) -> nn.Module:
    return Turned(inputs, outputs, bias) if structure.transposed else nn.Linear(inputs, outputs, bias=bias)


def relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu_squared": relu_squared,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Mlp(nn.Module):
    def __init__(self, structure: Structure, sizes: Sizes) -> None:
        super().__init__()
        self.structure, bias, width = structure, structure.mlp_bias, sizes.intermediate
        if structure.mlp == "gated_packed":
            self.gate_up = linear(structure, sizes.hidden, 2 * width, bias)
        else:
            self.up = linear(structure, sizes.hidden, width, bias)
        if structure.mlp == "gated":
            self.gate = linear(structure, sizes.hidden, width, bias)
        self.down = linear(structure, width, sizes.hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.structure.mlp_flat:
            x = x.view(-1, shape[-1])
        act = ACTIVATIONS[self.structure.activation]
        if self.structure.mlp == "plain":
            inner = act(self.up(x))
        elif self.structure.mlp == "gated":
            inner = act(self.gate(x)) * self.up(x)
        else:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            inner = up * act(gate)
        return self.down(inner).view(shape)


def rotary_size(structure: Structure, sizes: Sizes) -> int:
    """How many features of a head turn."""
    return 2 * (sizes.head_dim // 4) if structure.positions == "partial" else sizes.head_dim


class Rotary(nn.Module):
    """cos and sin of each position, computed once for all layers."""

    def __init__(self, structure: Structure, sizes: Sizes) -> None:
        super().__init__()
        size = rotary_size(structure, sizes)
        scaled = structure.positions == "scaled"
        self.factor = 1.2 if scaled else 1.0
        speeds = 100.0 ** -(torch.arange(0, size, 2).float() / size) / (3.0 if scaled else 1.0)
        self.register_buffer("speeds", speeds, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (self.speeds[None, :, None].float() @ positions[:, None, :].float()).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def turned_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [b, n, s, d], of which the first features turn, as many as `cos` has: the first half with the second."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    made = turning * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((made, rest), dim=-1) if rest.shape[-1] else made


def turned_pairs(x: Tensor, sin_cos: Tensor) -> Tensor:
    """x: [b, s, n, d]; every feature turns with its neighbour."""
    sin, cos = (half[:, :, None, :].repeat_interleave(2, 3) for half in sin_cos.chunk(2, dim=-1))
    other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + other * sin


def repeated(x: Tensor, times: int) -> Tensor:
    """Each head of [b, m, s, d] so many times."""
    b, m, s, d = x.shape
    return x if times == 1 else x[:, :, None].expand(b, m, times, s, d).reshape(b, m * times, s, d)


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """As models write it out; the result is [b, s, n, d]."""
    key, value = (repeated(x, module.num_key_value_groups) for x in (key, value))  # type: ignore[arg-type]
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    is_causal = True

    def __init__(self, structure: Structure, sizes: Sizes, config: StructuredConfig, index: int) -> None:
        super().__init__()
        self.structure, self.sizes, self.config, self.layer_idx = structure, sizes, config, index
        self.num_key_value_groups = sizes.heads // sizes.kv
        bias, hidden, d = structure.attention_bias != "none", sizes.hidden, sizes.head_dim
        if structure.projections == "separate":
            self.q = linear(structure, hidden, sizes.heads * d, bias)
            self.k = linear(structure, hidden, sizes.kv * d, bias)
            self.v = linear(structure, hidden, sizes.kv * d, bias)
        else:
            self.qkv = linear(structure, hidden, (sizes.heads + 2 * sizes.kv) * d, bias)
        self.out = linear(structure, sizes.heads * d, hidden, structure.attention_bias == "all")
        if structure.qk_norm != "none":
            shapes = {"head": lambda n: (d,), "each_head": lambda n: (n, d), "all": lambda n: (n * d,)}[structure.qk_norm]
            self.q_norm, self.k_norm = (Norm(structure.norm, *shapes(n)) for n in (sizes.heads, sizes.kv))
        if structure.positions == "interleaved":
            speeds = 100.0 ** -(torch.arange(0, d, 2).float() / d)
            angles = torch.arange(POSITIONS).float()[:, None] * speeds
            self.register_buffer("table", torch.cat((angles.sin(), angles.cos()), dim=-1), persistent=False)
        self.scaling = 0.3 if structure.attention_scale else d**-0.5

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as [b, s, heads, d]."""
        n, m, d = self.sizes.heads, self.sizes.kv, self.sizes.head_dim
        kind, front = self.structure.projections, x.shape[:-1]
        if kind == "separate":
            parts = self.q(x), self.k(x), self.v(x)
        elif kind == "packed":
            parts = self.qkv(x).split((n * d, m * d, m * d), dim=-1)
        elif kind == "heads_chunked":
            return self.qkv(x).view(*front, n, 3 * d).chunk(3, dim=-1)  # type: ignore[return-value]
        elif kind == "heads_indexed":
            packed = self.qkv(x).view(*front, n, 3, d)
            return packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
        else:
            packed = self.qkv(x).view(*front, m, n // m + 2, d)
            return packed[..., :-2, :].reshape(*front, n, d), packed[..., -2, :], packed[..., -1, :]
        return tuple(part.view(*front, -1, d) for part in parts)  # type: ignore[return-value]

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.structure.qk_norm == "none":
            return q, k
        if self.structure.qk_norm == "all":
            return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        return self.q_norm(q), self.k_norm(k)

    def forward(
        self, x: Tensor, mask: Any, positions: Tensor, turns: tuple[Tensor, Tensor] | None, bias: Tensor | None
    ) -> Tensor:
        q, k, v = self.projected(x)
        q, k = self.normed(q, k)
        if self.structure.positions == "interleaved":
            sin_cos = self.table[positions].to(x.dtype)
            q, k = turned_pairs(q, sin_cos), turned_pairs(k, sin_cos)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if turns is not None:
            q, k = turned_halves(q, *turns), turned_halves(k, *turns)
        attend: Callable[..., Any] = own_attention
        if self.structure.attention == "interface" and self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        given: dict[str, Any] = {"scaling": self.scaling, "dropout": 0.0}
        if self.config.attn_logit_softcapping is not None:
            given["softcap"] = self.config.attn_logit_softcapping
        if bias is not None:
            given["position_bias"] = bias
        made, _ = attend(self, q, k, v, mask, **given)
        return self.out(made.reshape(*x.shape[:-1], -1))


class Layer(nn.Module):
    def __init__(self, structure: Structure, sizes: Sizes, config: StructuredConfig, index: int) -> None:
        super().__init__()
        self.structure = structure
        self.attention, self.mlp = Attention(structure, sizes, config, index), Mlp(structure, sizes)
        names = ("norm_1",) if structure.block == "parallel_one_norm" else ("norm_1", "norm_2")
        for place in ("before", "after"):
            if structure.norm_place in ({"before": "pre", "after": "post"}[place], "both"):
                for name in names:
                    self.add_module(f"{name}_{place}", Norm(structure.norm, sizes.hidden))
        self.scale = 0.4 if structure.residual_scale else None

    def normed(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x) if hasattr(self, name) else x

    def scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        if self.structure.block == "parallel_one_norm":
            read = self.normed("norm_1_before", x)
            return x + self.scaled(self.normed("norm_1_after", self.attention(read, *context) + self.mlp(read)))
        mixed = self.attention(self.normed("norm_1_before", x), *context)
        mixed = self.scaled(self.normed("norm_1_after", mixed))
        if self.structure.block == "sequential":
            x = x + mixed
        made = self.scaled(self.normed("norm_2_after", self.mlp(self.normed("norm_2_before", x))))
        return made + x if self.structure.block == "sequential" else made + mixed + x


class StructuredForCausalLM(PreTrainedModel):
    config_class = StructuredConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, structure: Structure, sizes: Sizes) -> None:
        config = StructuredConfig(structure, sizes)
        written_out = structure.attention == "bypass" or structure.score_softcap  # sdpa refuses a softcap
        config._attn_implementation = "eager" if written_out else "sdpa"
        super().__init__(config)
        self.structure = structure
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        if structure.positions == "learned":
            self.places = nn.Embedding(POSITIONS, sizes.hidden)
        if structure.positions in ("rotary", "partial", "scaled"):
            self.rotary = Rotary(structure, sizes)
        if structure.positions == "alibi":
            self.register_buffer("slopes", 2.0 ** -(1.0 + torch.arange(sizes.heads).float() / 2), persistent=False)
        self.layers = nn.ModuleList(Layer(structure, sizes, config, i) for i in range(sizes.layers))
        self.norm = Norm(structure.norm, sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=structure.head_bias)
        if structure.tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        structure, x = self.structure, self.embed(input_ids)
        if structure.embedding_scale:
            x = x * math.sqrt(x.shape[-1])
        positions = position_ids
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        given = {"inputs_embeds": x, "attention_mask": attention_mask, "past_key_values": None, "position_ids": position_ids}
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        masks = {kind: makers[kind](config=self.config, **given) for kind in dict.fromkeys(self.config.layer_types)}
        if structure.positions == "learned":
            x = x + self.places(positions)
        turns = self.rotary(x, positions) if hasattr(self, "rotary") else None
        bias = None
        if structure.positions == "alibi":
            bias = (self.slopes[:, None] * torch.arange(x.shape[1], device=x.device))[None, :, None, :].to(x.dtype)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, masks[kind], positions, turns, bias)
        logits = self.head(self.norm(x))
        if structure.logit_softcap:
            logits = torch.tanh(logits / 3.0) * 3.0
        if labels is None:
            return CausalLMOutputWithPast(logits=logits)
        if structure.loss == "library":
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        else:
            rows = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            loss = functional.cross_entropy(rows, labels[:, 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def build(structure: Structure, sizes: Sizes, seed: int = 0) -> StructuredForCausalLM:
    """The model with real weights, every one of them random, that of a norm and a bias too: what is zero or one by default
    would hide how it is used."""
    model = StructuredForCausalLM(structure, sizes)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        scale, shift = (0.2, 0.0 if structure.norm == "rms_one" else 1.0) if "norm" in name else (0.2, 0.0)
        if name.endswith("bias"):
            shift = 0.0
        if parameter.dim() == 2 and "norm" not in name:
            scale = 0.5 if "embed" in name or "places" in name else 0.25
        parameter.data = noise * scale + shift
    return model


def policy(structure: Structure, **options: Any) -> shardcomp.Policy:
    """How a model of that structure splits. options: as `Policy.load` takes them."""
    weights = {"embed": "vocab", "layers.*.attention.out": "rowwise", "layers.*.mlp.down": "rowwise", "head": "vocab"}
    weights["layers.*.attention." + ("{q,k,v}" if structure.projections == "separate" else "qkv")] = "colwise"
    inner = {"gated": "{gate,up}", "gated_packed": "gate_up", "plain": "up"}[structure.mlp]
    weights[f"layers.*.mlp.{inner}"] = "colwise"
    if structure.qk_norm == "all" and structure.norm in ("rms", "rms_one"):
        weights["layers.*.attention.{q,k}_norm"] = "colwise"
    units = {"embed": "first", "layers.*": "layer", "head": "last"}
    entries = (tuple(Entry(parse(pattern), word) for pattern, word in table.items()) for table in (weights, units))
    return shardcomp.Policy("structured", *entries, asked=options, source="structures")
