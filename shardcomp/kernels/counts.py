"""Which kernels a Program holds, for reports and for policies that expect some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from shardcomp.ir import operators
from shardcomp.ir.program import Unit

_ORDER = list(operators.FAMILIES)
_ROWS = sorted((row for row in operators.OPERATORS.values() if row.kernel), key=lambda row: _ORDER.index(row.family))
NAMES = tuple(dict.fromkeys(row.kernel for row in _ROWS))
"""The kernels that reports and policies count."""


def kernel_counts(units: Iterable[Unit]) -> dict[str, dict[str, Any]]:
    """Kernel -> how many calls of it some units have, and in which modules, alike ones written once."""
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        for node in unit.body.calls():
            name = operators.facts_of(node).kernel
            if name:
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
