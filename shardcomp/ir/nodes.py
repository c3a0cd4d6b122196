"""What is known of a node of a graph, and the questions about nodes that several passes ask.

A node keeps what is known of it in `node.meta`. Its keys:

    value             `Value`, or a tuple of them where a call has several results; every node but the output has it
    path              a call: the path of the module that it was made in, relative to its unit, "" for the unit or the model
                      itself; a placeholder: its name in the model, relative to the unit where alike units share a body
    role              a placeholder: INPUT, PARAMETER or BUFFER
    source            a call: `file.py:line` in the model; absent on calls that passes insert
    no_grad           a captured call that was made under torch.no_grad(); `canonicalize` puts a `detach` in its place
    elsewhere         True for a call of a unit whose `path` is the whole path of a module outside of the unit
    form              a call in its split form: the `sharding.rules.Form` that it is
    partial_gradient  a parameter: the mesh axes on which each rank has a summand of its gradient
    again             (`MARK`) a call that is not run again when its unit is recomputed: KEEP or DROP

`torch.export` has keys of its own (`val`, `nn_module_stack`, `stack_trace`); only `capture` reads them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardcomp.ir.program import BUFFER, MARK, PARAMETER, Value


def values(node: fx.Node) -> tuple[Value, ...]:
    """What is known of a node's results, always as a tuple."""
    known = node.meta["value"]
    return (known,) if isinstance(known, Value) else tuple(known)


def value(node: fx.Node) -> Value:
    """What is known of a node's one result. Raises TypeError where it has several."""
    known = node.meta["value"]
    if not isinstance(known, Value):
        raise TypeError(f"{node} has several results")
    return known


def has_one_result(node: fx.Node) -> bool:
    """Whether a node has one tensor as its result, and not a tuple of them."""
    return isinstance(node.meta.get("value"), Value)


def operand_value(operand: fx.Node, user: fx.Node) -> Value:
    """What is known of an operand as `user` reads it: where it has several results, the one that `user` takes."""
    results = values(operand)
    # Only `getitem` reads several results, and its second argument is the index.
    return results[0] if len(results) == 1 else results[user.args[1]]  # type: ignore[index]


def path_of(node: fx.Node) -> str:
    """The module of a call, or the name of a placeholder; "" for the model itself and for the output."""
    return str(node.meta.get("path", ""))


def source_of(node: fx.Node) -> str:
    """`file.py:line` of the model that a call comes from; "" where a pass inserted it."""
    return str(node.meta.get("source", ""))


def role_of(node: fx.Node) -> str | None:
    """INPUT, PARAMETER or BUFFER for a placeholder; None for any other node."""
    return node.meta["role"] if node.op == "placeholder" else None


def is_parameter(node: Any) -> bool:
    """Whether something is a parameter's placeholder node."""
    return isinstance(node, fx.Node) and role_of(node) == PARAMETER


def is_buffer(node: Any) -> bool:
    """Whether something is a buffer's placeholder node."""
    return isinstance(node, fx.Node) and role_of(node) == BUFFER


def requires_grad(node: fx.Node) -> bool:
    """Whether a gradient flows into any result of a node."""
    return any(result.requires_grad for result in values(node))


def recompute_mark(node: fx.Node) -> str | None:
    """KEEP or DROP for a call that is not run again when its unit is recomputed; None for one that is."""
    return node.meta.get(MARK)


def form_of(node: fx.Node) -> Any:
    """The split form that a call is in (`sharding.rules.Form`); None for a call of the operator itself."""
    return node.meta.get("form")


def is_under_no_grad(node: fx.Node) -> bool:
    """Whether a captured call was made under torch.no_grad()."""
    return bool(node.meta.get("no_grad", False))


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in the order of the operator's schema, those inside lists included."""
    operands: list[fx.Node] = []
    # map_arg also looks into lists, as in `cat([a, b])`.
    fx.map_arg((node.args, node.kwargs), lambda argument: operands.append(argument))
    return operands


def stored(argument: Any) -> fx.Node | None:
    """The parameter that a call's argument is, as it is stored or transposed; None for anything else."""
    while isinstance(argument, fx.Node) and argument.target is torch.ops.aten.t.default:
        argument = argument.args[0]
    return argument if is_parameter(argument) else None


def ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Some nodes and all that they are computed from."""
    reached: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += node.all_input_nodes
    return reached


class _Number:
    """A node in a structural key: its number, written `%3`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def structural_arguments(node: fx.Node, numbers: Mapping[fx.Node, int]) -> str:
    """A call's arguments as text, each node written as its number: equal for calls that do the same."""
    return repr(fx.map_arg((node.args, node.kwargs), lambda argument: _Number(numbers[argument])))


def structural_key(nodes: Iterable[fx.Node], numbers: Mapping[fx.Node, int]) -> Hashable:
    """Equal for runs of calls that compute the same from operands of the same numbers.

    numbers: the number of each node and of each operand from outside.
    """
    return tuple((str(node.target), structural_arguments(node, numbers)) for node in nodes)
