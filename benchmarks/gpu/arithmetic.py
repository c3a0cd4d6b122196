"""What is computed without a GPU: parameters, the memory of a training step, its operations, and MFU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

GB = 1e9
MEMORY = {"H100": 81559 * 2**20, "H200": 143771 * 2**20}
"""Part of a GPU's name -> its memory in bytes. A dry run, on a machine without a GPU, plans for these."""
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12}
"""Part of a GPU's name -> its peak, in dense bf16 operations a second."""
OVERHEAD = 2 * GB
"""Memory for the driver, the workspaces of libraries and the gaps of the allocator."""
RECOMPUTE = {"none": 1.0, "selective": 1.05, "full": 4 / 3}
"""Kind of recompute -> the factor by which it makes a step longer, roughly."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA and its training step.

    preset: the configuration whose sizes it overrides. words: size of the vocabulary. tied: whether the head shares the
    embedding's weight. sequences: how many sequences of `seq` tokens an optimizer step has. full: the number of layers of the
    full model, if this one has fewer.
    """

    name: str
    preset: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    words: int
    tied: bool
    seq: int
    sequences: int
    full: int | None = None

    @property
    def layer_parameters(self) -> int:
        h, key_values = self.hidden, self.hidden // self.heads * self.key_heads
        return 2 * h * h + 2 * h * key_values + 3 * h * self.inner + 2 * h

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.hidden + (1 if self.tied else 2) * self.words * self.hidden

    @property
    def multiplied(self) -> int:
        """The number of parameters in matrix products. An input embedding is only looked up, unless it is the head as well."""
        return self.parameters - (0 if self.tied else self.words * self.hidden)

    def flops_per_token(self, causal: bool) -> int:
        """The model's operations for one token, forward and backward.

        6 N + 12 L h s, with N multiplied parameters, L layers, h features and s tokens in a sequence. With `causal`, attention
        computes half of its matrix: 6 L h s.
        """
        return 6 * self.multiplied + (6 if causal else 12) * self.layers * self.hidden * self.seq

    def config(self) -> Any:
        """The HuggingFace configuration."""
        from shardcomp import presets

        config = presets.config_of(self.preset)
        config.update(
            {
                "hidden_size": self.hidden,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.key_heads,
                "head_dim": self.hidden // self.heads,
                "vocab_size": self.words,
                "tie_word_embeddings": self.tied,
                "max_position_embeddings": max(self.seq, config.max_position_embeddings),
            }
        )
        return config


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7b", "llama-2-7b", 4096, 11008, 32, 32, 32, 32000, False, 4096, 4),
        Shape("1b", "llama-3-8b", 2048, 8192, 16, 32, 8, 128256, True, 4096, 16),
        Shape("3b", "llama-3-8b", 3072, 8192, 28, 24, 8, 128256, True, 4096, 8),
        Shape("tiny", "tiny", 32, 48, 2, 4, 2, 260, False, 32, 2),
    )
}


@dataclass(frozen=True)
class Setting:
    """One way to run a step.

    micro_batch: in sequences. recompute: a key of RECOMPUTE. gathered: whether the bf16 copy of the parameters stays between
    forward and backward.
    """

    micro_batch: int
    recompute: str
    gathered: bool = True


VARIANTS = ("hf-eager", "shardcomp", "hf-compile", "shardcomp-compile", "fsdp2", "hf-liger")
"""The variants that are compared, in the order in which they run."""
MEANING = {
    "hf-eager": "unmodified HuggingFace with SDPA; bf16 weights and gradients, float32 masters, torch's fused AdamW",
    "shardcomp": "shardcomp.shard, its kernels, shardcomp.AdamW",
    "hf-compile": "hf-eager with every layer and the loss under torch.compile",
    "shardcomp-compile": "shardcomp with compile = true",
    "fsdp2": "HuggingFace under torch's fully_shard; float32 parameters, computed in bf16, torch's fused AdamW",
    "hf-liger": "hf-eager, patched by Liger-Kernel",
}
_FUSED = ("shardcomp", "shardcomp-compile", "hf-compile", "hf-liger")
_BF16_WEIGHTS = ("hf-eager", "hf-compile", "hf-liger")
"""The variants whose weights are bf16, with masters in the optimizer. In the others the parameters are the float32 masters."""


def settings(variant: str, shape: Shape) -> list[Setting]:
    """All settings of a variant. Those that should be faster come first."""
    sizes = [size for size in range(shape.sequences, 0, -1) if shape.sequences % size == 0]
    kinds = [kind for kind in RECOMPUTE if kind != "selective" or variant.startswith("shardcomp")]
    gathered = (True,) if variant in _BF16_WEIGHTS else (True, False)
    result = [Setting(*values) for values in itertools.product(sizes, kinds, gathered)]
    return sorted(result, key=lambda setting: (RECOMPUTE[setting.recompute], -setting.micro_batch, not setting.gathered))


def memory(variant: str, shape: Shape, setting: Setting) -> dict[str, float]:
    """Estimate the bytes of a step at its peak: `states`, `activations`, `loss`, `transient`, and their `total`.

    A parameter has these states: a float32 master and two float32 moments, 12 bytes together; a gradient of 4 bytes, or of 2 if
    the weights are bf16; and a bf16 copy of 2 bytes, if it stays.
    """
    h, f, a, layer = shape.hidden, shape.inner, shape.heads, shape.layer_parameters
    embedding = shape.words * h
    bf16_weights = variant in _BF16_WEIGHTS
    per_parameter = 12 + (2 + 2 if bf16_weights else 4 + 2 * setting.gathered)
    key_values = 4 * h * shape.key_heads / a
    # Bytes that a layer saves for its backward, per token. A fused operator saves its operands; a chain saves every step.
    saved = {
        "none": 12 * h + key_values + 6 * f if variant in _FUSED else 20 * h + key_values + 8 * f,
        "selective": 8 * h + key_values + 4 * f,
        "full": 2 * h,
    }
    tokens = setting.micro_batch * shape.seq
    one_layer = saved["none"] + 4 * a + 8  # during its backward, a recomputed layer has all its values
    recomputed = one_layer if setting.recompute != "none" else 0
    activations = tokens * (shape.layers * (saved[setting.recompute] + 4 * a) + recomputed)
    logits = shape.words * tokens
    if variant.startswith("shardcomp") or variant == "hf-liger":  # logits in chunks, and an accumulated weight gradient
        loss = min(4 * embedding, 2 * logits) + 2 * embedding + 8 * h * tokens
    else:
        loss = (10 if variant == "hf-compile" else 14) * logits
    # The float32 gradient of one group of parameters. Float32 parameters also need bf16 copies of two layers and of the
    # embeddings.
    copies = 0 if bf16_weights else 4 * layer + 2 * (1 if shape.tied else 2) * embedding
    transient = 4.0 * max(layer, embedding) + copies
    parts = {
        "states": float(per_parameter * shape.parameters),
        "activations": float(activations),
        "loss": float(loss),
        "transient": transient + OVERHEAD,
    }
    return {**parts, "total": sum(parts.values())}


def candidates(variant: str, shape: Shape, device_memory: float, most: int = 3) -> list[Setting]:
    """The settings to try in turn: the fastest one that should fit, and the next ones. Empty if none should fit."""
    fitting = [option for option in settings(variant, shape) if memory(variant, shape, option)["total"] <= device_memory]
    return fitting[:most]


def fitted(shape: Shape, device_memory: float, variants: tuple[str, ...] = VARIANTS) -> Shape:
    """The shape with as many layers as every variant can train without recompute. A twentieth of the memory stays free.

    Raises:
        ValueError: one layer does not fit.
    """
    for layers in range(shape.layers, 0, -1):
        part = shape if layers == shape.layers else replace(shape, layers=layers, full=shape.layers)
        if all(any(_without_recompute(variant, part, 0.95 * device_memory)) for variant in variants):
            return part
    raise ValueError(f"{shape.name}: not one layer fits in {device_memory / GB:.0f} GB")


def _without_recompute(variant: str, shape: Shape, device_memory: float) -> Iterator[bool]:
    for setting in settings(variant, shape):
        if setting.recompute == "none":
            yield memory(variant, shape, setting)["total"] <= device_memory


def peak(device: str) -> float | None:
    """The peak of a GPU by its name, in dense bf16 operations a second. None for an unknown GPU."""
    return next((flops for name, flops in PEAKS.items() if name in device), None)


def mfu(shape: Shape, tokens_per_second: float, device: str) -> dict[str, float | None]:
    """The model's operations as a share of the peak: attention counted in full, and counted as causal."""
    peak_flops = peak(device)
    return {
        name: None if peak_flops is None else tokens_per_second * shape.flops_per_token(causal) / peak_flops
        for name, causal in (("full_attention", False), ("causal", True))
    }


def memory_of(device: str) -> float | None:
    """The memory of a GPU by its name, in bytes. None for an unknown GPU."""
    return next((float(size) for name, size in MEMORY.items() if name in device), None)
