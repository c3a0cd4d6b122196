"""One row per operator: everything that the compiler knows of an ATen operator, whichever file asks.

A pass asks for operators by what they do: `operators.of_family("attention")`, `operators.with_fact("selects")`,
`operators.becoming("reshape")`. The fused kernels add their own rows with `add`, each in its own file under
`shardcomp.kernels`. To teach the compiler a new operator, add a row here; `tests/ir/test_operators.py` shows what each query
gives.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

FAMILIES = {
    "view": "numbers in other places, or some of them; nothing is computed",
    "cast": "the same numbers in another dtype",
    "split": "several results, each of them some of the operand",
    "join": "several operands, or one several times, in one result",
    "matmul": "rows by columns",
    "reduction": "one number for many: sums, means, maxima",
    "scan": "along one dimension, from end to end: softmax, cumsum",
    "pointwise": "number by number",
    "lookup": "rows of a table",
    "dropout": "random zeros",
    "norm": "normalised over the last dimensions",
    "rotary": "rotary positions",
    "gated": "an activated value times another",
    "attention": "queries, keys and values",
    "loss": "a cross entropy",
    "other": "nothing is known of it",
}
"""Family -> what its operators compute. Kernels are counted in this order."""

FACTS = {
    "bijective": "the same numbers in another shape or order, each of them once",
    "selects": "some of the operand's numbers",
    "moves": "puts numbers elsewhere and computes nothing: what a rotary embedding is written with",
    "same_numbers": "the result has no number that the first operand, or the model itself, does not have",
    "token_index": "may stand between the tokens and the embedding that they look up",
    "may_copy": "a view or a copy, as the strides have it; or a view that a gradient sees differently",
    "moment": "a sum over features from which a norm is made",
    "root": "takes the root that a norm divides by",
    "activation": "what an MLP applies to its gate",
    "makes_logits": "a loss together with the product that makes its logits",
    "mixes_tokens": "a token's result depends on other tokens, as in attention",
}
"""A fact about an operator -> what it says."""

BACKWARD = {
    "operands": "may read any of its operands",
    "others": "the gradient of one operand reads the other operands",
    "indices": "reads indices alone",
    "nothing": "reads none of its operands",
}
"""What the backward of an operator reads."""


@dataclass(frozen=True)
class Operator:
    """What is known of one operator.

    family: a key of `FAMILIES`.
    facts: keys of `FACTS`.
    rule: how it may be sharded: a line of the notation (see `sharding.notation`), or the name of a function in
        `sharding.rules`. Empty where it has no rule, or a kernel registers one.
    rows: how a call treats dimension 0: the name of a function in `sharding.leading_dims`. Empty where nothing is known.
    becomes: what `canonicalize` makes of it: nothing (`operand`), or one operator for many.
    backward: what its backward reads, a key of `BACKWARD`.
    prints: how the listing writes it: an infix sign, `minus` before the operand, `function` of torch.nn.functional, `method`
        of a tensor, `sizes` for a method that takes the local sizes of the result, else `aten.…`.
    contracts: for a product without a rule, the operand whose last dimension is summed over.
    sparse: the position of its argument `sparse`.
    kernel: for a fused kernel, the name that reports and policies count it under.
    variants: for a fused kernel, the ways to call it in the place of a subgraph of its family, which `fusion.matchers` tries in
        order. norm: called with (eps, the constants of the subgraph, the number of its vectors), it gives for each way the
        positions of the vectors among its arguments, None for an argument left out, and the keyword arguments. gated: called
        with nothing, it gives keyword arguments.
    """

    family: str
    facts: frozenset[str] = frozenset()
    rule: str = ""
    rows: str = ""
    becomes: str = ""
    backward: str = "operands"
    prints: str = "aten"
    contracts: int | None = None
    sparse: int | None = None
    kernel: str = ""
    variants: Callable[..., Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        unknown = {self.family} - FAMILIES.keys() | self.facts - FACTS.keys() | {self.backward} - BACKWARD.keys()
        if unknown:
            raise ValueError(f"no such family, fact or backward: {', '.join(sorted(unknown))}")


def _row(family: str, facts: str = "", **columns: Any) -> Operator:
    return Operator(family, frozenset(facts.split()), **columns)


OPERATORS: dict[Any, Operator] = {
    # Views, and what becomes one.
    aten.view: _row("view", "same_numbers", becomes="reshape"),
    aten._unsafe_view: _row("view", becomes="reshape"),
    aten.reshape: _row(
        "view", "bijective moves same_numbers token_index may_copy", rule="reshape", becomes="reshape", prints="sizes"
    ),
    aten.flatten: _row("view", "same_numbers may_copy", becomes="reshape"),
    aten.unflatten: _row("view", "same_numbers", becomes="reshape"),
    aten.squeeze: _row("view", "same_numbers", becomes="reshape", prints="method"),
    aten.view_as: _row("view", becomes="reshape"),
    aten.reshape_as: _row("view", becomes="reshape"),
    aten.ravel: _row("view", becomes="reshape"),
    aten.expand: _row("view", "moves same_numbers token_index", rule="expand", rows="expand", becomes="expand", prints="sizes"),
    aten.expand_as: _row("view", becomes="expand"),
    aten.broadcast_to: _row("view", becomes="expand"),
    aten.unsqueeze: _row(
        "view", "bijective moves same_numbers token_index", rule="unsqueeze", rows="along 1 new", prints="method"
    ),
    aten.transpose: _row("view", "bijective moves same_numbers", rule="reorder", rows="transpose", prints="method"),
    aten.permute: _row("view", "bijective moves same_numbers", rule="reorder", rows="permute", prints="method"),
    aten.t: _row("view", rule="reorder"),
    aten.numpy_T: _row("view", becomes="t"),
    aten.slice: _row("view", "selects moves same_numbers token_index", rule="along 1 linear", rows="along 1"),
    aten.select: _row("view", "selects moves same_numbers", rule="along 1 gone linear", rows="along 1"),
    aten.narrow: _row("view", "same_numbers"),
    aten.roll: _row("view", "same_numbers", rule="along 2 linear", rows="along 2"),
    aten.flip: _row("view", rule="along 1", rows="along 1"),
    aten.contiguous: _row("view", "same_numbers may_copy", becomes="operand"),
    aten.clone: _row("view", "same_numbers", rule="... -> ... | linear 0", becomes="operand", prints="method"),
    aten.alias: _row("view", becomes="operand"),
    aten.lift_fresh: _row("view", becomes="operand"),
    aten.lift_fresh_copy: _row("view", becomes="operand"),
    aten.detach: _row("view", "may_copy", rule="... -> ... | linear 0", rows="pointwise", prints="method"),
    # Casts.
    aten.to: _row(
        "cast",
        "same_numbers token_index",
        rule="pointwise",
        rows="pointwise",
        becomes="to",
        backward="nothing",
        prints="method",
    ),
    aten._to_copy: _row("cast", becomes="to", backward="nothing"),
    aten.type_as: _row("cast", becomes="to"),
    # One value as several, and several as one.
    aten.split: _row("split", "selects moves", rule="along 2", rows="along 2"),
    aten.chunk: _row("split", "selects moves", rule="along 2", rows="along 2"),
    aten.split_with_sizes: _row("split", "selects moves", rule="along 2", rows="along 2"),
    aten.unbind: _row("split", "selects moves", rule="along 1 gone", rows="along 1"),
    operator.getitem: _row("view", rule="item", rows="by row"),
    aten.cat: _row("join", "moves", rule="along 1 linear", rows="along 1"),
    aten.stack: _row("join", "moves", rule="stack", rows="along 1 new"),
    aten.repeat: _row("join", rule="expand"),
    aten.repeat_interleave: _row("join", "moves", rule="along 2 linear", rows="along 2"),
    aten.pad: _row("join", "same_numbers", rule="pad", rows="pad"),
    aten.constant_pad_nd: _row("join", "same_numbers", rule="pad", rows="pad"),
    aten.slice_scatter: _row("join", "same_numbers"),
    aten.select_scatter: _row("join", "same_numbers"),
    # Products.
    aten.linear: _row("matmul", rule="... i, o i, +o -> ... o | linear 0", rows="linear", backward="others", prints="function"),
    aten.mm: _row("matmul", rule="r i, i o -> r o | linear 0 1", rows="matmul", becomes="linear", backward="others"),
    aten.bmm: _row("matmul", rule="z r i, z i o -> z r o | linear 0 1", rows="matmul", backward="others"),
    aten.addmm: _row("matmul", rule="+o, r i, i o -> r o | linear 1", becomes="linear", backward="others"),
    aten.matmul: _row("matmul", rule="matmul", rows="matmul", becomes="linear", backward="others", contracts=0),
    aten.baddbmm: _row("matmul", becomes="linear", contracts=1),
    aten.mv: _row("matmul", contracts=0),
    aten.dot: _row("matmul", contracts=0),
    # Reductions and scans.
    aten.sum: _row("reduction", "moment", rule="sum", rows="along 1", prints="method"),
    aten.mean: _row("reduction", "moment", rows="along 1", prints="method"),
    aten.var: _row("reduction", "moment", rule="reduce", rows="along 1"),
    aten.amax: _row("reduction", rule="reduce", rows="along 1"),
    aten.amin: _row("reduction", rows="along 1"),
    aten.any: _row("reduction", rule="reduce", rows="along 1"),
    aten.softmax: _row("scan", "mixes_tokens", rule="along 1", rows="along 1"),
    aten._safe_softmax: _row("scan", "mixes_tokens"),
    aten.log_softmax: _row("scan", rule="along 1", rows="along 1"),
    aten.cumsum: _row("scan", rule="along 1", rows="along 1", prints="method"),
    aten.diff: _row("scan", prints="method"),
    # Number by number. Operators that torch tags as pointwise need a row only where more is to be said of them.
    aten.add: _row("pointwise", prints="+"),
    aten.sub: _row("pointwise", prints="-"),
    aten.mul: _row("pointwise", backward="others", prints="*"),
    aten.div: _row("pointwise", prints="/"),
    aten.neg: _row("pointwise", prints="minus"),
    aten.where: _row("pointwise", rows="pointwise"),
    aten.masked_fill: _row("pointwise", "same_numbers", rows="pointwise"),
    aten.pow: _row("pointwise", prints="method"),
    aten.rsqrt: _row("pointwise", "root", prints="method"),
    aten.sqrt: _row("pointwise", "root", prints="method"),
    aten.reciprocal: _row("pointwise", "root"),
    aten.silu: _row("pointwise", "activation", prints="function"),
    aten.gelu: _row("pointwise", "activation", prints="function"),
    aten.relu: _row("pointwise", "activation", prints="function"),
    aten.sigmoid: _row("pointwise", "activation", prints="method"),
    aten.tanh: _row("pointwise", "activation", prints="method"),
    aten.erf: _row("pointwise", "activation"),
    aten.exp: _row("pointwise", "activation", prints="method"),
    aten.elu: _row("pointwise", "activation"),
    aten.mish: _row("pointwise", "activation"),
    aten.softplus: _row("pointwise", "activation"),
    **{
        getattr(aten, name): _row("pointwise", prints="method")
        for name in ["cos", "sin", "log", "eq", "ne", "lt", "le", "gt", "ge"]
    },
    # Norms, lookups, dropout, attention and losses, as torch has them.
    aten.layer_norm: _row("norm", rule="norm", rows="norm"),
    aten.rms_norm: _row("norm", rule="norm", rows="norm"),
    aten.embedding: _row("lookup", backward="indices", sparse=4),
    aten.embedding_bag: _row("lookup", sparse=5),
    aten._embedding_bag: _row("lookup", sparse=5),
    aten.index: _row("lookup", "selects", rule="index", backward="indices"),
    aten.dropout: _row("dropout"),
    aten.feature_dropout: _row("dropout"),
    aten.alpha_dropout: _row("dropout"),
    aten.feature_alpha_dropout: _row("dropout"),
    aten.scaled_dot_product_attention: _row("attention", "mixes_tokens", rule="attention"),
    aten.cross_entropy_loss: _row("loss"),
}
"""Operator -> its row. The keys are ATen operators without their overload, and Python functions."""

_NONE = Operator("other")


def add(function: Callable[..., Any], family: str, facts: str = "", **columns: Any) -> None:
    """Give a fused kernel its row; `columns` are fields of `Operator`."""
    OPERATORS[function] = _row(family, facts, **columns)


def without_overload(target: Any) -> Any:
    """An ATen operator without its overload; anything else as it is."""
    return getattr(target, "overloadpacket", target)


def operator_of(node: fx.Node) -> Any:
    """The operator that a node calls: an ATen operator without its overload, or a Python function."""
    return without_overload(node.target)


def operator_name(node: fx.Node) -> str:
    """The operator that a node calls as messages name it: `aten.add`, or a function's own name."""
    target = operator_of(node)
    return str(target) if is_aten(node) else getattr(target, "__name__", str(target))


def is_aten(node: fx.Node) -> bool:
    """Whether a node calls an operator of torch, and not a Python function."""
    return hasattr(node.target, "overloadpacket")


def facts_of(node: fx.Node) -> Operator:
    """The row of the operator that a node calls; an empty one where it has none."""
    return OPERATORS.get(operator_of(node), _NONE)


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return node.target is operator.getitem


def is_pointwise(node: fx.Node) -> bool:
    """Whether torch itself says of an operator that it works number by number."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def of_family(family: str, *, fused: bool = True) -> frozenset[Any]:
    """The operators of a family, with or without the fused kernels."""
    if family not in FAMILIES:
        raise ValueError(f"no such family: {family}")
    # Fused kernels are Python functions, and ATen operators are not.
    return frozenset(target for target in _having(lambda row: row.family == family) if fused or not inspect.isfunction(target))


def kernels_of(family: str) -> tuple[str, ...]:
    """The names of the fused kernels of a family, as reports and policies write them."""
    return tuple(dict.fromkeys(row.kernel for row in OPERATORS.values() if row.kernel and row.family == family))


def variants_of(family: str) -> list[tuple[Callable[..., Any], Callable[..., Iterable[Any]]]]:
    """(kernel, its variants) for the fused kernels of a family that may replace a subgraph."""
    return [(target, row.variants) for target, row in OPERATORS.items() if row.family == family and row.variants is not None]


def with_fact(fact: str) -> frozenset[Any]:
    """The operators of which a fact holds."""
    if fact not in FACTS:
        raise ValueError(f"no such fact: {fact}")
    return _having(lambda row: fact in row.facts)


def becoming(form: str) -> frozenset[Any]:
    """The operators of which `canonicalize` makes this form."""
    return _having(lambda row: row.becomes == form)


def backward_reading(what: str) -> frozenset[Any]:
    """The operators whose backward reads this much, a key of `BACKWARD`."""
    return _having(lambda row: row.backward == what)


def _having(holds: Callable[[Operator], bool]) -> frozenset[Any]:
    return frozenset(target for target, row in OPERATORS.items() if holds(row))
