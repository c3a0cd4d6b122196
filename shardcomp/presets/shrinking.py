"""A small configuration of the same structure as a large one: what a plan is verified on.

Sizes are the keys that HuggingFace configurations share, or those that `attribute_map` gives for them. They only shrink.
Everything else stays: biases, tied embeddings, activation, kind of rotary embedding.
"""

from __future__ import annotations

import math
from typing import Any

from shardcomp.errors import ShardError

LAYERS, HEAD_DIM, VOCABULARY, POSITIONS, WINDOW = 2, 16, 97, 128, 8
"""The sizes to shrink to. The vocabulary is odd, so that it never divides evenly. The window is shorter than any batch."""
MAX_HEADS = 16
"""Up to this many query heads, the ratio of query heads to key-value heads stays."""
MAX_LAYERS = 8
"""The small model has more than `LAYERS`, up to this many, if it needs them to have one of each kind."""

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

    What `tensor` ranks split evenly at full size they split evenly here. Only the vocabulary never divides.

    Args:
        config: a HuggingFace configuration. It stays as it is.
        keep: values by key that the result has. Sizes that depend on them follow.
        tensor: the degree of tensor parallelism.
        layers: how many layers the result has, at least.

    Raises:
        ShardError: a key of `keep` does not exist, or the configuration's class refuses the result.

    Example:
        >>> from shardcomp import presets
        >>> small = shrink(presets.config_of("llama-7b"), tensor=4)
        >>> small.num_hidden_layers, small.num_attention_heads, small.vocab_size
        (2, 8, 97)
    """
    return _Shrinking(config, dict(keep or {}), tensor, layers).run()


class _Shrinking:
    def __init__(self, config: Any, keep: dict[str, Any], tensor: int, layers: int) -> None:
        self.config, self.tensor, self.layers = config, tensor, layers
        self.names: dict[str, str] = dict(getattr(config, "attribute_map", None) or {})
        self.full: dict[str, Any] = config.to_dict()
        unknown = [key for key in keep if self.names.get(key, key) not in self.full]
        if unknown:
            known = ", ".join(sorted(key for key, value in self.full.items() if isinstance(value, int)))
            raise ShardError(f"{type(config).__name__} has no {', '.join(unknown)} to set; it has {known}")
        self.keep = {self.names.get(key, key): value for key, value in keep.items()}
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
        except Exception as error:
            sizes = ", ".join(f"{k} = {v}" for k, v in self.small.items() if v != self.full[k] and isinstance(v, int))
            raise ShardError(
                f"{type(self.config).__name__} shrunk to {sizes} is refused by its class: {error}; set these with --shrink "
                "KEY=VALUE, or verify it as it is (--shrink none)"
            ) from error

    def _full(self, key: str) -> Any:
        return self.full.get(self.names.get(key, key))

    def _set(self, key: str, value: Any) -> Any:
        """Set a value unless the caller keeps another one. Returns the value that the result has."""
        key = self.names.get(key, key)
        if key not in self.keep:
            self.small[key] = value
        return self.small[key]

    def _keep(self, key: str) -> Any:
        """The value that the caller keeps, or None."""
        return self.keep.get(self.names.get(key, key))

    def _heads_and_widths(self) -> None:
        full_heads, full_hidden = self._full("num_attention_heads"), self._full("hidden_size")
        groups = next((key for key in KEY_VALUE_HEADS if isinstance(self._full(key), int)), None)
        full_groups = self._full(groups) if groups else full_heads
        ratio = max(1, full_heads // full_groups)

        keep_heads = self._keep("num_attention_heads")
        few = self._keep(groups) if groups and self._keep(groups) else self._few_groups(full_groups)
        if keep_heads and not (groups and self._keep(groups)):
            few = keep_heads if ratio == 1 else math.gcd(keep_heads, few)
        heads = self._set("num_attention_heads", few * self._few_per_group(few, ratio, full_heads))
        if groups:
            self._set(groups, few)

        full_dim = self._full("head_dim") or full_hidden // full_heads
        # Where keys and values are computed from a latent vector, further sizes depend on head_dim, each in its own way.
        dim = full_dim if self._full("kv_lora_rank") else min(HEAD_DIM, full_dim)
        if self._keep("hidden_size") and full_dim * full_heads == full_hidden:
            dim = self._keep("hidden_size") // heads
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
        """How many key-value heads: two for each rank, so that to mistake one for the other shows. They split no better than at
        full size."""
        if full % self.tensor:
            return math.gcd(full, self.tensor)
        return min(full, 2 * self.tensor)

    def _few_per_group(self, groups: int, ratio: int, full_heads: int) -> int:
        """How many query heads for each key-value head: as at full size, or its smallest divisor that splits as evenly."""
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
        # A list with a value for each layer, such as its type.
        lists = {key: value for key, value in self.full.items() if isinstance(value, list) and len(value) == full}
        count = min(max(LAYERS, self.layers), full)
        kinds = {key: len(set(map(str, values))) for key, values in lists.items()}
        while count < min(full, MAX_LAYERS) and any(len(set(map(str, v[:count]))) < kinds[key] for key, v in lists.items()):
            count += 1
        count = self._set("num_hidden_layers", count)
        for key, values in lists.items():
            self._set(key, (values * count)[:count])

    def _vocabulary(self) -> None:
        rows = VOCABULARY
        while -(-rows // self.tensor) * (self.tensor - 1) >= rows:  # one rank would have none
            rows += 2
        rows = self._set("vocab_size", min(rows, self._full("vocab_size")))
        for key, value in self.full.items():
            if not key.endswith("_token_id"):
                continue
            if isinstance(value, int):
                self._set(key, min(value, rows - 1))
            elif isinstance(value, list):
                self._set(key, sorted({min(token, rows - 1) for token in value}))

    def _positions(self) -> None:
        stretched = any(_is_stretched(self.full.get(key)) for key in ROTARY)
        if isinstance(self._full("max_position_embeddings"), int) and not stretched:
            self._set("max_position_embeddings", min(POSITIONS, self._full("max_position_embeddings")))
        if isinstance(self._full("sliding_window"), int):
            self._set("sliding_window", min(WINDOW, self._full("sliding_window")))


def _is_stretched(rotary: Any) -> bool:
    """Whether a rotary embedding is scaled by a rule that depends on the number of positions."""
    if not isinstance(rotary, dict):
        return False
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    return kind != "default" or any(_is_stretched(value) for value in rotary.values())


def _cut_factors(rotary: dict[str, Any], full_dim: int, dim: int) -> dict[str, Any]:
    """The same rule for heads of `dim` elements: a list with a factor for each frequency becomes shorter."""
    result: dict[str, Any] = {}
    for key, value in rotary.items():
        if isinstance(value, dict):
            value = _cut_factors(value, full_dim, dim)
        elif isinstance(value, list) and key.endswith("factor"):
            value = value[: len(value) * dim // full_dim]
        result[key] = value
    return result
