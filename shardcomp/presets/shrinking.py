"""A small configuration of the same structure as a large one: what a plan is verified on.

Sizes are found by the names that HuggingFace configurations share (through `attribute_map` where a family has its own), and are
only made smaller. Everything that is not a size stays: biases, tied embeddings, activation, kind of rotary embedding.
"""

from __future__ import annotations

import math
from typing import Any

from shardcomp.errors import ShardError

LAYERS, HEAD_DIM, VOCABULARY, POSITIONS, WINDOW = 2, 16, 97, 128, 8
"""What is aimed at. The vocabulary is odd, so that it never divides; the window is shorter than any batch."""
MAX_HEADS = 16
"""The ratio of query heads to key-value heads is kept up to this many heads."""
MAX_LAYERS = 8
"""Layers that are kept, at most, to have one of each kind."""

KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
INNER = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
)
LIKE_HIDDEN = ("word_embed_proj_dim",)
ROTARY = ("rope_parameters", "rope_scaling")


def shrink(config: Any, keep: dict[str, Any] | None = None, tensor: int = 1, layers: int = 1) -> Any:
    """A small configuration of the same class and structure.

    What `tensor` ranks split evenly at full size they split evenly here; the vocabulary never divides. layers: how many there
    are at least. keep: values by key that
    are taken as they are, the other sizes following where they depend on them. Raises ShardError for an unknown key, or where
    the configuration's class refuses the result.
    """
    return _Shrinking(config, dict(keep or {}), tensor, layers).run()


class _Shrinking:
    def __init__(self, config: Any, keep: dict[str, Any], tensor: int, layers: int) -> None:
        self.config, self.tensor, self.layers = config, tensor, layers
        self.names: dict[str, str] = dict(getattr(config, "attribute_map", None) or {})
        self.full: dict[str, Any] = config.to_dict()
        unknown = [key for key in keep if self.names.get(key, key) not in self.full]
        if unknown:
            known = ", ".join(sorted(key for key, held in self.full.items() if isinstance(held, int)))
            raise ShardError(f"{type(config).__name__} has no {', '.join(unknown)} to set; it has {known}")
        self.keep = {self.names.get(key, key): held for key, held in keep.items()}
        self.small = {**self.full, **self.keep}

    def run(self) -> Any:
        needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        absent = [key for key in needed if not isinstance(self._full(key), int)]
        if absent:
            raise ShardError(
                f"{type(self.config).__name__} has no {', '.join(absent)}, so it cannot shrink: take it whole (--shrink none)"
            )
        self._heads_and_widths()
        self._layers()
        self._vocabulary()
        self._positions()
        try:
            return type(self.config).from_dict(self.small)
        except Exception as problem:
            sizes = ", ".join(f"{k} = {v}" for k, v in self.small.items() if v != self.full[k] and isinstance(v, int))
            raise ShardError(
                f"{type(self.config).__name__} shrunk to {sizes} is refused by its class: {problem}; set these with --shrink "
                "KEY=VALUE, or verify it as it is (--shrink none)"
            ) from problem

    def _full(self, key: str) -> Any:
        return self.full.get(self.names.get(key, key))

    def _set(self, key: str, wanted: Any) -> Any:
        """Set a size unless the caller keeps it; what holds then."""
        key = self.names.get(key, key)
        if key not in self.keep:
            self.small[key] = wanted
        return self.small[key]

    def _kept(self, key: str) -> Any:
        return self.keep.get(self.names.get(key, key))

    def _heads_and_widths(self) -> None:
        full_heads, full_hidden = self._full("num_attention_heads"), self._full("hidden_size")
        groups = next((key for key in KEY_VALUE_HEADS if isinstance(self._full(key), int)), None)
        full_groups = self._full(groups) if groups else full_heads
        ratio = max(1, full_heads // full_groups)

        kept_heads = self._kept("num_attention_heads")
        few = self._kept(groups) if groups and self._kept(groups) else self._few_groups(full_groups)
        if kept_heads and not (groups and self._kept(groups)):
            few = kept_heads if ratio == 1 else math.gcd(kept_heads, few)
        heads = self._set("num_attention_heads", few * self._few_per_group(few, ratio, full_heads))
        if groups:
            self._set(groups, few)

        full_dim = self._full("head_dim") or full_hidden // full_heads
        # Where keys and values are made from a latent vector, several sizes depend on head_dim in ways of their own.
        dim = full_dim if self._full("kv_lora_rank") else min(HEAD_DIM, full_dim)
        if self._kept("hidden_size") and full_dim * full_heads == full_hidden:
            dim = self._kept("hidden_size") // heads
        dim = self._set("head_dim", dim) if isinstance(self._full("head_dim"), int) else dim
        hidden = self._set("hidden_size", self._scaled(full_hidden, heads * dim, full_heads * full_dim, dim))

        for key in LIKE_HIDDEN:
            if isinstance(self._full(key), int):
                self._set(key, self._scaled(self._full(key), hidden, full_hidden, dim))
        for key in INNER:
            if isinstance(self._full(key), int):
                self._set(key, self._scaled(self._full(key), hidden, full_hidden, 4))
        if isinstance(self._full("rotary_dim"), int):
            self._set("rotary_dim", max(2, self._full("rotary_dim") * dim // full_dim // 2 * 2))
        for key in ROTARY:
            if isinstance(self._full(key), dict):
                self._set(key, _cut_factors(self._full(key), full_dim, dim))

    def _few_groups(self, full: int) -> int:
        """Key-value heads: two for each rank, so that one taken for the other shows; no better split than at full size."""
        if full % self.tensor:
            return math.gcd(full, self.tensor)
        return min(full, 2 * self.tensor)

    def _few_per_group(self, groups: int, ratio: int, full_heads: int) -> int:
        """Query heads to a key-value head: the ratio of the full size, or its smallest divisor that splits as evenly."""
        if groups * ratio <= MAX_HEADS:
            return ratio
        divisors = (n for n in range(2, ratio) if ratio % n == 0)
        even = full_heads % self.tensor == 0
        return next((n for n in divisors if not even or groups * n % self.tensor == 0), ratio)

    def _scaled(self, full: int, part: int, whole: int, multiple: int) -> int:
        """`full` · `part` / `whole` as a multiple of `multiple`, and of the tensor degree if `full` is one."""
        step = math.lcm(multiple, self.tensor) if full % self.tensor == 0 else multiple
        return min(full, max(1, round(full * part / whole / step)) * step)

    def _layers(self) -> None:
        full = self._full("num_hidden_layers")
        lists = {key: held for key, held in self.full.items() if isinstance(held, list) and len(held) == full}
        count = min(max(LAYERS, self.layers), full)
        kinds = {key: len(set(map(str, held))) for key, held in lists.items()}
        while count < min(full, MAX_LAYERS) and any(len(set(map(str, h[:count]))) < kinds[key] for key, h in lists.items()):
            count += 1
        count = self._set("num_hidden_layers", count)
        for key, held in lists.items():
            self._set(key, (held * count)[:count])

    def _vocabulary(self) -> None:
        rows = VOCABULARY
        while -(-rows // self.tensor) * (self.tensor - 1) >= rows:  # a rank would be left without any
            rows += 2
        rows = self._set("vocab_size", min(rows, self._full("vocab_size")))
        for key, held in self.full.items():
            if not key.endswith("_token_id"):
                continue
            if isinstance(held, int):
                self._set(key, min(held, rows - 1))
            elif isinstance(held, list):
                self._set(key, sorted({min(token, rows - 1) for token in held}))

    def _positions(self) -> None:
        stretched = any(_is_stretched(self.full.get(key)) for key in ROTARY)
        if isinstance(self._full("max_position_embeddings"), int) and not stretched:
            self._set("max_position_embeddings", min(POSITIONS, self._full("max_position_embeddings")))
        if isinstance(self._full("sliding_window"), int):
            self._set("sliding_window", min(WINDOW, self._full("sliding_window")))


def _is_stretched(rotary: Any) -> bool:
    """Whether a rotary embedding is scaled by a rule in which the number of positions appears."""
    if not isinstance(rotary, dict):
        return False
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    return kind != "default" or any(_is_stretched(held) for held in rotary.values())


def _cut_factors(rotary: dict[str, Any], full_dim: int, dim: int) -> dict[str, Any]:
    """The same rule for heads of `dim`: where it has a factor for each frequency, fewer of them."""
    found: dict[str, Any] = {}
    for key, held in rotary.items():
        if isinstance(held, dict):
            held = _cut_factors(held, full_dim, dim)
        elif isinstance(held, list) and key.endswith("factor"):
            held = held[: len(held) * dim // full_dim]
        found[key] = held
    return found
