"""The policy `auto`: units and the split of every weight, found from a model's graph, or its `tp_plan` where that is better.

`layers` finds the units, `pairs` the weights that are split together. No name of a module means anything here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from shardcomp.cost.communication import messages
from shardcomp.errors import PolicyError
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import Context, Program
from shardcomp.passes import canonicalize, partition_units, split_packed_weights, tensor_parallel, unflatten
from shardcomp.policy.auto.layers import unit_paths
from shardcomp.policy.auto.pairs import words
from shardcomp.policy.patterns import Entry, parse
from shardcomp.policy.policy import Policy

_SAMPLE = (1, 2048)
"""The (batch, length) at which the messages of two policies are compared; the length is a multiple of it for every degree."""


def derive(program: Program, policy: Policy, mesh: Mesh, tp_plan: Mapping[str, str] | None = None) -> Policy:
    """`policy` with the entries that fit a captured Program.

    tp_plan: transformers' own plan of the model. Of it and of what the graph alone says, the one is taken that splits as much
    and sends less. Raises PolicyError where the degree does not fit the model.
    """
    context = Context(mesh, policy)
    flat = split_packed_weights.split_packed(
        unflatten.run(canonicalize.run(program, context), context), lambda name: True, mesh.tp
    )
    unit_kinds = unit_paths(flat)
    entries = tuple(Entry(parse(pattern), kind) for pattern, kind in unit_kinds.items())
    partitioned = partition_units.run(flat, Context(mesh, replace(policy, units=entries)))
    pattern = next((text for text, kind in unit_kinds.items() if kind == "layer" and text.endswith("*")), None)
    own = words(partitioned)
    derived = replace(policy, automatic=False, units=entries, weights=_entries(own, partitioned, pattern))
    planned = replace(derived, weights=_entries(_with_plan(own, tp_plan or {}, partitioned), partitioned, pattern))
    if mesh.tp == 1 or planned.weights == derived.weights:
        return derived
    return _better(derived, planned, program, mesh)


def _entries(words_of: Mapping[str, str], program: Program, pattern: str | None) -> tuple[Entry, ...]:
    """Entries for module path -> word: those of all layers under the layers' pattern, neighbours with the same word in one pair
    of braces."""
    layers = [unit.path for unit in program.units if unit.kind == "layer"]
    inside: dict[tuple[str, str], list[str]] = {}
    patterns: dict[str, str] = {}
    for module, word in words_of.items():
        layer = next((path for path in layers if module.startswith(path + ".")), None)
        if layer is None:
            patterns[module] = word
        else:
            inside.setdefault((module[len(layer) + 1 :], word), []).append(layer)
    modules = {p.module for p in program.parameters.values()}
    for (rest, word), where in inside.items():
        having = [layer for layer in layers if f"{layer}.{rest}" in modules]
        for prefix in [pattern] if pattern and where == having else where:
            patterns[f"{prefix}.{rest}"] = word
    return tuple(Entry(parse(text), word) for text, word in _braced(patterns))


def _braced(patterns: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for pattern, word in patterns.items():
        parent, _, leaf = pattern.rpartition(".")
        grouped.setdefault((parent, word), []).append(leaf)
    for (parent, word), leaves in grouped.items():
        last = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        yield ".".join(part for part in (parent, last) if part), word


def _with_plan(own: Mapping[str, str], tp_plan: Mapping[str, str], program: Program) -> dict[str, str]:
    """Module path -> word, where transformers' plan has one in the place of `own`; embedding and head stay as they are."""
    modules = dict.fromkeys(p.module for p in program.parameters.values())
    planned = dict(own)
    for key, style in tp_plan.items():
        word = next((word for word in ("colwise", "rowwise") if str(style).removeprefix("packed_").startswith(word)), "whole")
        pattern = re.compile(r"\.".join(r"[^.]+" if part == "*" else re.escape(part) for part in str(key).split(".")))
        planned.update({module: word for module in modules if pattern.fullmatch(module) and own.get(module) != "vocab"})
    return {module: word for module, word in planned.items() if word != "whole"}


def _better(derived: Policy, planned: Policy, program: Program, mesh: Mesh) -> Policy:
    """The one that sends less, if it splits as much."""
    costs: list[tuple[int, float]] = []
    for policy in (derived, planned):
        lowered = program
        try:
            for compiler_pass in (canonicalize, unflatten, split_packed_weights, partition_units, tensor_parallel):
                lowered = compiler_pass.run(lowered, Context(mesh, policy))
        except PolicyError:
            costs.append((sys.maxsize, 0.0))
        else:
            costs.append((_replicated(lowered), _sent(lowered, policy)))
    (replicated, sent), (replicated_planned, sent_planned) = costs
    return planned if replicated_planned <= replicated and sent_planned < sent else derived


def _replicated(program: Program) -> int:
    """The elements of all parameters that are not split."""
    return sum(math.prod(p.shape) for p in program.parameters.values() if p.layout.on("tp").dim is None)


def _sent(program: Program, policy: Policy) -> float:
    """The bytes that a rank passes in along tp in one step."""
    batch, length = program.static_shape or (_SAMPLE[0], _SAMPLE[1] * program.mesh.tp)
    rank: dict[str, int] = program.mesh.coordinates(0)
    sent: Any = messages(program, policy.options, batch, length, 1, rank)
    return sum(m.bytes for m in sent if m.axis != "dp")
