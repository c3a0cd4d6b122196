"""A small model that no library knows, and what a pass makes of it in the printed language."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import shardcomp
from shardcomp.lowered import Lowered
from shardcomp.policy.patterns import Entry, parse

PINNED = dict(
    line.split("==") for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines() if "==" in line
)
pinned_torch = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != PINNED["torch"],
    reason="the listings are those of the torch in constraints.txt",
)
WEIGHTS = {"embed": "vocab", "layers.*.packed": "colwise", "layers.*.down": "rowwise", "head": "vocab"}
UNITS = {"embed": "first", "layers.*": "layer", "head": "last"}


class GatedLayer(nn.Module):
    """A gate and its factor from one packed weight. merges: samples and tokens are one dimension meanwhile."""

    def __init__(self, merges: bool) -> None:
        super().__init__()
        self.packed, self.down = nn.Linear(8, 24, bias=False), nn.Linear(12, 8, bias=False)
        self.merges = merges

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.packed(hidden.reshape(-1, 8) if self.merges else hidden).chunk(2, -1)
        return hidden + self.down(functional.silu(gate) * up).view(hidden.shape)


class GatedModel(nn.Module):
    """An embedding, gated layers and a head."""

    config = None

    def __init__(self, layers: int = 2, merges: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.layers = nn.ModuleList(GatedLayer(merges) for _ in range(layers))
        self.head = nn.Linear(8, 23, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def lower_gated_model(layers: int = 2, merges: bool = False, **options: Any) -> Lowered:
    """The gated model, lowered in float32 for a policy of its own."""
    weights, units = (tuple(Entry(parse(path), word) for path, word in table.items()) for table in (WEIGHTS, UNITS))
    policy = shardcomp.Policy("gated", weights, units, {"precision": "fp32", **options})
    return shardcomp.lower(GatedModel(layers, merges), policy, seq=8)


def before_and_after(lowered: Lowered, name: str, class_name: str) -> tuple[str, str]:
    """One class of the listing before the pass of this name, and after it."""
    names = [record.name for record in lowered.records]
    before, after = (lowered.records[names.index(name) + step].listing() for step in (-1, 0))
    return class_listing(before, class_name), class_listing(after, class_name)


def class_listing(listing: str, class_name: str) -> str:
    """The lines of one class of a listing, without the lines of the model that they come from; empty where there is no such
    class."""
    _, _, rest = listing.partition(f"\nclass {class_name}(")
    lines = f"class {class_name}({rest}".partition("\n\n\n")[0].splitlines()
    return "\n".join(["", *(re.sub(r"\s+# \w+\.py:\d+$", "", line).rstrip() for line in lines), ""]) if rest else ""
