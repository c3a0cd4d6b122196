"""Which kernels a Program holds, for reports and for policies that expect some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from shardcomp.ir.program import Unit
from shardcomp.kernels.add_rms_norm import add_rms_norm
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy, vocab_cross_entropy
from shardcomp.kernels.dropout import dropped_attention
from shardcomp.kernels.gated import geglu, swiglu
from shardcomp.kernels.layer_norm import layer_norm
from shardcomp.kernels.linear_cross_entropy import linear_cross_entropy, vocab_linear_cross_entropy
from shardcomp.kernels.rms_norm import rms_norm
from shardcomp.kernels.rotary import rotary

_KERNELS = (rms_norm, add_rms_norm, layer_norm, rotary, swiglu, geglu, attention, cross_entropy, linear_cross_entropy)
_NAMES: dict[Any, str] = {each: each.__name__ for each in _KERNELS}
_NAMES |= {dropped_attention: "attention", vocab_cross_entropy: "cross_entropy"}
_NAMES[vocab_linear_cross_entropy] = "linear_cross_entropy"
NAMES = tuple(dict.fromkeys(_NAMES.values()))
"""The kernels that reports and policies count."""


def kernel_counts(units: Iterable[Unit]) -> dict[str, dict[str, Any]]:
    """Kernel -> how many calls of it some units have, and in which modules, alike ones written once."""
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        for node in unit.body.calls():
            name = _NAMES.get(node.target)
            if name is not None:
                entry = found.setdefault(name, {"count": 0, "where": {}})
                entry["count"] += 1
                entry["where"][place_of(unit, node)] = None
    order = [name for name in NAMES if name in found]
    return {name: {"count": found[name]["count"], "where": list(found[name]["where"])} for name in order}


def place_of(unit: Unit, node: fx.Node) -> str:
    """The module that a call of a unit lies in, `*` for numbers, as alike units have it."""
    path = node.meta.get("path", "")
    whole = path if node.meta.get("elsewhere") else ".".join(part for part in (unit.path, path) if part)
    return ".".join("*" if part.isdigit() else part for part in whole.split("."))
