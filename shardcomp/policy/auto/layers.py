"""The units of a model, found from its tree of modules and the graph: the embedding, the repeated layers, the head."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from shardcomp.ir.nodes import is_parameter, path_of, tensor_arguments
from shardcomp.ir.operators import facts_of, operator_of
from shardcomp.ir.program import Program
from shardcomp.kernels.cross_entropy import cross_entropy

aten = torch.ops.aten
_MOST = 0.75
"""The share of a module's weights that its only layer has; the others are tables of positions and the like."""


@dataclass
class _Module:
    """What is under a module path: matrices with their sizes, and whether attention is computed there."""

    path: str
    children: dict[str, _Module] = field(default_factory=dict)
    matrices: int = 0
    elements: int = 0
    mixes: bool = False

    @property
    def is_block(self) -> bool:
        return self.matrices >= 2


def unit_paths(program: Program) -> dict[str, str]:
    """Pattern of module paths -> kind of unit, for a canonical Program of one unit."""
    [unit] = program.units
    calls = list(unit.body.calls())
    tables = {_module(node) for node in lookups(calls)}
    heads = {path for node in head(calls) if (path := path_of(node))}
    root = _tree(program, calls, tables | heads)
    layers = _layers(root)
    if not _in_turn(layers, calls):
        layers = _holding(layers)
    outside = [path for path in (*tables, *heads) if not any(_under(path, layer) or _under(layer, path) for layer in layers)]
    kinds = {path: "first" for path in outside if path in tables}
    modules = [*(path.module for path in program.parameters.values()), *(path_of(node) for node in calls)]
    kinds |= {pattern: "layer" for pattern in _patterns(layers, modules)}
    kinds |= {path: "last" for path in outside if path in heads and path not in tables}
    return kinds


def lookups(calls: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The tables that are looked up with the tokens themselves."""
    for node in calls:
        if operator_of(node) is not aten.embedding:
            continue
        index = node.args[1]
        while isinstance(index, fx.Node) and "token_index" in facts_of(index).facts:
            index = index.args[0]
        table = node.args[0]
        is_input = isinstance(index, fx.Node) and path_of(index) == "input_ids"
        if is_input and isinstance(table, fx.Node) and is_parameter(table):
            yield table


def head(calls: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The product that makes the logits of the loss."""
    for node in calls:
        if node.target is not cross_entropy:
            continue
        operand = node.args[0]
        while isinstance(operand, fx.Node) and not _is_product(operand):
            operands = tensor_arguments(operand)
            operand = operands[0] if operands else None
        if isinstance(operand, fx.Node):
            yield operand


def _in_turn(layers: list[str], calls: Iterable[fx.Node]) -> bool:
    """Whether each layer has run when the next one begins, and does not run again."""
    products = (node for node in calls if _is_product(node))
    visits = [layer for node in products for layer in layers if _under(path_of(node), layer)]
    return len(list(itertools.groupby(visits))) == len(set(visits))


def _holding(paths: list[str]) -> list[str]:
    """The innermost module that holds all of `paths`; none where that is the model itself."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, columns)]
    return [".".join(shared)] if shared else []


def _is_product(node: fx.Node) -> bool:
    """Whether a call is a product that has a sharding rule."""
    row = facts_of(node)
    return row.family == "matmul" and bool(row.rule)


def _module(parameter: fx.Node) -> str:
    return path_of(parameter).rpartition(".")[0]


def _under(path: str, other: str) -> bool:
    return path == other or path.startswith(other + ".")


def _tree(program: Program, calls: list[fx.Node], left_out: set[str]) -> _Module:
    """The tree of modules; the tables and heads that are units of their own count for nothing in it."""
    root = _Module("")

    def at(path: str) -> Iterator[_Module]:
        node = root
        yield node
        for part in path.split(".") if path else ():
            below = f"{node.path}.{part}" if node.path else part
            node = node.children.setdefault(part, _Module(below))
            yield node

    for parameter in program.parameters.values():
        if len(parameter.shape) > 1 and parameter.module not in left_out:
            for module in at(parameter.module):
                module.matrices += 1
                module.elements += int(torch.Size(parameter.shape).numel())
    for call in calls:
        if "mixes_tokens" in facts_of(call).facts:
            for module in at(path_of(call)):
                module.mixes = True
    return root


def _layers(root: _Module) -> list[str]:
    """The paths of the layers: the outermost blocks beside each other that do attention; with only one, the block itself."""
    level = [root]
    while level:
        for parent in level:
            blocks = [child for child in parent.children.values() if child.is_block]
            mixing = [child for child in blocks if child.mixes or not root.mixes]
            if len(mixing) > 1:
                return [child.path for child in blocks]
        level = [child for parent in level for child in parent.children.values()]
    only = root
    while True:
        inner = [child for child in only.children.values() if child.mixes or not root.mixes]
        if len(inner) != 1 or not inner[0].is_block or inner[0].elements < _MOST * only.elements:
            return [only.path] if only.path else []
        only = inner[0]


def _patterns(layers: list[str], modules: Iterable[str]) -> list[str]:
    """One pattern for all layers, where they are all that their parent has. modules: the paths of those that hold or compute
    something."""
    parents = {path.rpartition(".")[0] for path in layers}
    if len(layers) < 2 or len(parents) > 1:
        return layers
    start = f"{parent}." if (parent := parents.pop()) else ""
    children = {start + path.removeprefix(start).split(".")[0] for path in modules if path.startswith(start) and path != parent}
    return [f"{start}*"] if children == set(layers) else layers
