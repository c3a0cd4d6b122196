"""Merged leading dimensions: what is computed on them is computed apart, to the same numbers, and the rest stays as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import shardcomp
from measure.families import sent
from shardcomp import Policy
from shardcomp.ir.interpreter import call, evaluate
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.nodes import value
from shardcomp.ir.program import INPUT, PARAMETER, B, Body, Context, Parameter, Program, S, Signature, Unit, Value
from shardcomp.ir.well_formed import check_program
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.kernels.dropout import SHARED, Stream, dropout
from shardcomp.lowered import Lowered
from shardcomp.passes import canonicalize, unflatten
from support.families import tiny_config
from support.listings import before_and_after, lower_gated_model, pinned_torch

aten = torch.ops.aten
CONTEXT = Context(Mesh(), Policy.load("llama"))
PRIMES = {B: 7, S: 11}
"""The (b, s) that a graph is built at. No other size has these factors, so that a size says what it is made of."""


class Drawing:
    """A graph that is built call by call; sizes and dtypes are those that the operators give."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: dict[str, Value] = {}
        self.parameters: dict[str, Parameter] = {}
        self.env: dict[fx.Node, Any] = {}

    def input(self, *shape: Any, dtype: torch.dtype = torch.float64) -> fx.Node:
        name = f"in{len(self.inputs)}"
        self.inputs[name] = Value(shape, dtype)
        return self._placeholder(name, INPUT, Value(shape, dtype))

    def parameter(self, *shape: int) -> fx.Node:
        name = f"p{len(self.parameters)}.weight"
        self.parameters[name] = Parameter(name, shape, torch.float64)
        return self._placeholder(name, PARAMETER, Value(shape, torch.float64, requires_grad=True))

    def _placeholder(self, name: str, role: str, held: Value) -> fx.Node:
        made = self.graph.placeholder(name.replace(".", "_"))
        made.meta = {"role": role, "path": name, "value": held}
        self.env[made] = torch.empty([int(sympy.sympify(n).subs(PRIMES)) for n in held.shape], dtype=held.dtype, device="meta")
        return made

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        result = self.env[made] = call(made, self.env, PRIMES)
        several = isinstance(result, (tuple, list))
        held = [Value(tuple(_size(n) for n in each.shape), each.dtype) for each in (result if several else [result])]
        made.meta = {"value": tuple(held) if several else held[0], "path": "layer", "source": ""}
        return made

    def reshape(self, node: fx.Node, *shape: Any) -> fx.Node:
        return self(aten.reshape.default, node, list(shape))

    def program(self, *results: fx.Node) -> Program:
        """The graph in canonical form. Placeholders come first, as in what is captured."""
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and n.meta["role"] == PARAMETER]:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            first.prepend(node)
        self.graph.output(results)
        names = {f"out{i}": f"out{i}" for i in range(len(results))}
        unit = Unit("", "model", Body("Model", self.graph), tuple(self.inputs), tuple(names), tuple(self.parameters))
        signature = Signature(tuple((name, len(held.shape)) for name, held in self.inputs.items()), tuple(names))
        program = Program("drawn", signature, [unit], self.inputs, names, dict(self.inputs), self.parameters, {})
        return canonicalize.run(program, CONTEXT)


def _size(number: int) -> Any:
    size: Any = 1
    for symbol, prime in PRIMES.items():
        while number % prime == 0:
            number, size = number // prime, size * symbol
    return size * number


def results(program: Program) -> list[Tensor]:
    """The outputs and every gradient, at b = 2 and s = 3."""
    draw = torch.Generator().manual_seed(0)

    def tensor(held: Any) -> Tensor:
        shape = [int(sympy.sympify(n).subs({B: 2, S: 3})) for n in held.shape]
        if not held.dtype.is_floating_point:
            return torch.randint(0, 5, shape, generator=draw)
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    inputs = {name: tensor(held) for name, held in program.inputs.items()}
    weights = {name: tensor(p) for name, p in program.parameters.items()}
    outputs = list(evaluate(program, inputs, weights).values())
    leaves = [t for t in (*inputs.values(), *weights.values()) if t.requires_grad]
    loss = sum((out * torch.randn(out.shape, generator=draw, dtype=torch.float64)).sum() for out in outputs)
    return [*outputs, *(g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None)]  # type: ignore[arg-type]


def unflattened(program: Program) -> Program:
    """What the pass makes of a program, whose results and gradients are what they were."""
    before = str(program.units[0].body.graph)
    after = unflatten.run(program, CONTEXT)
    assert str(program.units[0].body.graph) == before
    check_program(after, {"canonical", "unmerged"}, "unflatten")
    found, wanted = results(after), results(program)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    _shapes_are_what_they_say(after)
    return after


def _shapes_are_what_they_say(program: Program) -> None:
    env: dict[fx.Node, Any] = {}
    for node in program.units[0].body.graph.nodes:
        if node.op == "placeholder":
            shape = [int(sympy.sympify(n).subs(PRIMES)) for n in value(node).shape]
            env[node] = torch.empty(shape, dtype=value(node).dtype, device="meta")
        elif node.op == "call_function":
            env[node] = call(node, env, PRIMES)
            known, made = node.meta["value"], env[node]
            for each, tensor in zip(known, made, strict=True) if isinstance(known, tuple) else [(known, made)]:
                assert tuple(int(sympy.sympify(n).subs(PRIMES)) for n in each.shape) == tuple(tensor.shape), node
                assert each.dtype == tensor.dtype, node


def targets(program: Program) -> list[Any]:
    return [getattr(node.target, "overloadpacket", node.target) for node in program.units[0].body.calls()]


def merges(program: Program) -> list[fx.Node]:
    """Values whose first size is more than b, or more than the s of a matrix."""
    return [n for n in program.units[0].body.calls() if isinstance(n.meta["value"], Value) and _is_merged(value(n).shape)]


def _is_merged(shape: tuple[Any, ...]) -> bool:
    return bool(shape) and sympy.sympify(shape[0]).has(B) and shape[0] != B


# Each operator, on [b·s, 8] or [b·4, s, 8].

ROWS: dict[str, Callable[[Drawing, fx.Node], fx.Node]] = {
    "an activation": lambda d, x: d(aten.relu.default, x),
    "a scale": lambda d, x: d(aten.mul.Tensor, x, d.parameter(8)),
    "a sum with itself": lambda d, x: d(aten.add.Tensor, x, x),
    "a row that is broadcast": lambda d, x: d(aten.add.Tensor, x, d.parameter(1, 8)),
    "a choice": lambda d, x: d(aten.where.ScalarOther, d(aten.gt.Scalar, x, 0.0), x, -1.0),
    "a cast": lambda d, x: d(aten.to.dtype, d(aten.to.dtype, x, torch.float32), torch.float64),
    "linear": lambda d, x: d(aten.linear.default, x, d.parameter(6, 8), d.parameter(6)),
    "mm": lambda d, x: d(aten.mm.default, x, d.parameter(8, 6)),
    "mm with a matrix that is computed": lambda d, x: d(aten.mm.default, x, d(aten.relu.default, d.parameter(8, 6))),
    "addmm": lambda d, x: d(aten.addmm.default, d.parameter(6), x, d.parameter(8, 6)),
    "matmul": lambda d, x: d(aten.matmul.default, x, d.parameter(8, 6)),
    "layer_norm": lambda d, x: d(aten.layer_norm.default, x, [8], d.parameter(8), d.parameter(8), 1e-5, False),
    "rms_norm": lambda d, x: d(aten.rms_norm.default, x, [8], d.parameter(8), 1e-6),
    "softmax": lambda d, x: d(aten.softmax.int, x, -1),
    "log_softmax": lambda d, x: d(aten.log_softmax.int, x, 1),
    "cumsum": lambda d, x: d(aten.cumsum.default, x, 1),
    "flip": lambda d, x: d(aten.flip.default, x, [1]),
    "a sum": lambda d, x: d(aten.sub.Tensor, x, d(aten.sum.dim_IntList, x, [-1], True)),
    "a mean": lambda d, x: d(aten.mean.dim, x, [1], False),
    "a variance": lambda d, x: d(aten.var.correction, x, [-1], correction=0, keepdim=True),
    "a largest": lambda d, x: d(aten.amax.default, x, [1]),
    "slices joined": lambda d, x: d(aten.cat.default, [d(aten.slice.Tensor, x, 1, 4), d(aten.slice.Tensor, x, -1, 0, 4)], -1),
    "one column": lambda d, x: d(aten.select.int, x, 1, 3),
    "columns stacked": lambda d, x: d(aten.stack.default, [x, x], -1),
    "halves": lambda d, x: _halves(d, x, d(aten.split.Tensor, x, 4, -1)),
    "chunks": lambda d, x: _halves(d, x, d(aten.chunk.default, x, 2, 1)),
    "pieces": lambda d, x: _halves(d, x, d(aten.split_with_sizes.default, x, [4, 4], 1)),
    "padding": lambda d, x: d(aten.pad.default, x, [1, 1]),
    "repeats": lambda d, x: d(aten.repeat_interleave.self_int, x, 2, 1),
    "a new dimension that is repeated": lambda d, x: _widened(d, x),
    "heads": lambda d, x: _heads(d, x),
}


def _halves(d: Drawing, x: fx.Node, parts: fx.Node) -> fx.Node:
    left, right = (d(operator.getitem, parts, i) for i in range(2))
    return d(aten.mul.Tensor, d(aten.silu.default, left), right)


def _widened(d: Drawing, x: fx.Node) -> fx.Node:
    return d(aten.expand.default, d(aten.unsqueeze.default, x, -1), [B * S, 8, 3])


def _heads(d: Drawing, x: fx.Node) -> fx.Node:
    over = d(aten.transpose.int, d.reshape(x, B * S, 2, 4), 1, 2)
    return d.reshape(d(aten.permute.default, over, [0, 2, 1]), B * S, 8)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_computed_without_being_merged(name: str) -> None:
    d = Drawing()
    x = d.input(B, S, 8)
    flat = ROWS[name](d, d.reshape(x, B * S, 8))
    apart = d.reshape(flat, B, S, *value(flat).shape[1:])
    before = d.program(apart)
    after = unflattened(before)
    assert not merges(after)
    assert len(targets(after)) <= len(targets(before)) - 2


HEADS: dict[str, Callable[[Drawing, fx.Node, fx.Node], fx.Node]] = {
    "bmm": lambda d, q, k: d(aten.bmm.default, q, d(aten.transpose.int, k, 1, 2)),
    "matmul": lambda d, q, k: d(aten.matmul.default, q, d(aten.transpose.int, k, -1, -2)),
    "matmul by one matrix": lambda d, q, k: d(aten.matmul.default, q, d.parameter(8, 3)),
    "a product with a matrix in front": lambda d, q, k: d(
        aten.matmul.default, d.parameter(1, 5, 8), d(aten.transpose.int, k, 1, 2)
    ),
    "a mask of all heads": lambda d, q, k: d(aten.masked_fill.Tensor, q, d(aten.gt.Scalar, d.input(1, S, 8), 0.0), d.input()),
    "baddbmm": lambda d, q, k: _sum(d, q, k, 1, 1),
    "baddbmm with a scale": lambda d, q, k: _sum(d, q, k, 1.0, 0.25),
    "baddbmm with two scales": lambda d, q, k: _sum(d, q, k, 0.5, 2),
    "baddbmm that adds nothing": lambda d, q, k: _sum(d, q, k, 0, 0.25),
}


def _sum(d: Drawing, q: fx.Node, k: fx.Node, beta: float, alpha: float) -> fx.Node:
    slopes = d(aten.repeat.default, d.input(4, 1, S), [B, 1, 1])
    return d(aten.baddbmm.default, slopes, q, d(aten.transpose.int, k, 1, 2), beta=beta, alpha=alpha)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_computed_without_being_merged(name: str) -> None:
    d = Drawing()
    q, k = (d.reshape(d.input(B, 4, S, 8), 4 * B, S, 8) for _ in range(2))
    flat = HEADS[name](d, q, k)
    rows, columns = value(flat).shape[1:]
    after = unflattened(d.program(d.reshape(flat, B, 4, rows, columns)))
    assert not merges(after) and aten.reshape not in targets(after)


def test_a_product_with_a_summand_is_made_in_as_few_steps_as_its_scales_allow() -> None:
    expected = {
        (1, 1): [aten.bmm, aten.add],
        (1, 0.25): [aten.mul, aten.bmm, aten.add],
        (0.5, 1): [aten.bmm, aten.mul, aten.add],
        (0, 1): [aten.bmm],
    }
    for (beta, alpha), wanted in expected.items():
        d = Drawing()
        added, left, right = d.input(B, S, 3), d.input(B, S, 8), d.input(B, 8, 3)
        assert targets(d.program(d(aten.baddbmm.default, added, left, right, beta=beta, alpha=alpha))) == wanted


def test_a_sum_that_a_weight_does_not_add_to_still_gives_it_a_gradient() -> None:
    d = Drawing()
    made = d(aten.baddbmm.default, d.parameter(3), d.input(B, S, 8), d.input(B, 8, 3), beta=0)
    program = d.program(made)
    assert targets(program) == [aten.baddbmm] and len(results(unflattened(program))) == 4


def test_a_whole_attention_with_slopes_loses_every_reshape_but_those_of_the_features() -> None:
    d = Drawing()
    x = d.input(B, S, 32)
    q, k, v = (d.reshape(d(aten.linear.default, x, d.parameter(32, 32)), B, S, 4, 8) for _ in range(3))
    q, k, v = (d.reshape(d(aten.transpose.int, each, 1, 2), 4 * B, S, 8) for each in (q, k, v))
    slopes = d(aten.repeat.default, d.input(4, 1, S), [B, 1, 1])
    scores = d(aten.baddbmm.default, slopes, q, d(aten.transpose.int, k, 1, 2), beta=1.0, alpha=0.125)
    weights = d(aten.softmax.int, d.reshape(scores, B, 4, S, S), -1)
    mixed = d.reshape(d(aten.bmm.default, d.reshape(weights, 4 * B, S, S), v), B, 4, S, 8)
    y = d.reshape(d(aten.permute.default, mixed, [0, 2, 1, 3]), B, S, 32)
    after = unflattened(d.program(d(aten.linear.default, y, d.parameter(32, 32))))
    assert not merges(after) and targets(after).count(aten.reshape) == 4
    [slopes] = [node for node in after.units[0].body.calls() if node.target is aten.expand.default]
    assert value(slopes).shape == (B, 4, 1, S)


# What else there is around a merge.


def test_three_dimensions_that_are_merged_in_two_steps_stay_apart() -> None:
    d = Drawing()
    x = d.input(B, 4, S, 8)
    all_rows = d(aten.relu.default, d.reshape(d(aten.tanh.default, d.reshape(x, 4 * B, S, 8)), 4 * B * S, 8))
    heads = d(aten.silu.default, d.reshape(all_rows, 4 * B, S, 8))
    after = unflattened(d.program(d.reshape(heads, B, 4, S, 8)))
    assert targets(after) == [aten.tanh, aten.relu, aten.silu]


def test_a_dimension_of_one_is_no_part_of_a_merge() -> None:
    d = Drawing()
    flat = d(aten.relu.default, d.reshape(d.input(B, 1, S, 8), B * S, 8))
    after = unflattened(d.program(d.reshape(flat, B, S, 8)))
    assert targets(after) == [aten.reshape, aten.relu] and not merges(after)


def test_what_else_reads_a_merged_value_is_given_the_twin_merged() -> None:
    d = Drawing()
    flat = d(aten.linear.default, d.reshape(d.input(B, S, 8), B * S, 8), d.parameter(8, 8))
    kept = d(aten.cumsum.default, flat, 0)
    after = unflattened(d.program(d.reshape(d(aten.relu.default, flat), B, S, 8), kept))
    assert targets(after).count(aten.linear) == 1
    [merged] = [node for node in after.units[0].body.calls() if node.target is aten.reshape.default]
    assert [user.target for user in merged.users] == [aten.cumsum.default]
    assert value(merged.args[0]).shape == (B, S, 8)  # type: ignore[arg-type]


def test_an_operand_that_no_merge_made_is_taken_apart_in_front() -> None:
    d = Drawing()
    flat = d.reshape(d.input(B, S, 8), B * S, 8)
    mixed = d(aten.cumsum.default, flat, 0)
    total = d(aten.add.Tensor, d(aten.linear.default, flat, d.parameter(8, 8)), mixed)
    after = unflattened(d.program(d.reshape(total, B, S, 8)))
    [linear] = [node for node in after.units[0].body.calls() if node.target is aten.linear.default]
    assert value(linear).shape == (B, S, 8) and len(targets(after)) == 5


def test_an_operand_that_is_a_reshape_itself_is_reshaped_once() -> None:
    d = Drawing()
    flat = d.reshape(d.input(B, S, 8), B * S, 8)
    other = d.reshape(d(aten.cumsum.default, d.input(B * S * 8), 0), B * S, 8)
    after = unflattened(d.program(d.reshape(d(aten.add.Tensor, flat, other), B, S, 8)))
    assert targets(after) == [aten.cumsum, aten.reshape, aten.add]


def test_operands_that_were_merged_from_other_sizes_are_left_alone() -> None:
    d = Drawing()
    one, other = d.reshape(d.input(B, S, 8), B * S, 8), d.reshape(d.input(S, B, 8), B * S, 8)
    program = d.program(d.reshape(d(aten.add.Tensor, one, other), B, S, 8))
    assert targets(unflattened(program)) == targets(program)


ALONE: dict[str, Callable[[Drawing, fx.Node], fx.Node]] = {
    "a sum over rows": lambda d, x: d(aten.sum.dim_IntList, x, [0]),
    "a sum over everything": lambda d, x: d(aten.sum.default, x),
    "rows one after the other": lambda d, x: d.reshape(d(aten.cumsum.default, x, 0), B, S, 8),
    "rows in another order": lambda d, x: d.reshape(d(aten.flip.default, x, [0, 1]), B, S, 8),
    "some rows": lambda d, x: d(aten.slice.Tensor, x, 0, 0, 5),
    "rows turned into columns": lambda d, x: d.reshape(d(aten.t.default, x), 8, B, S),
    "rows by rows": lambda d, x: d(aten.mm.default, d(aten.transpose.int, x, 0, 1), x),
    "rows as a matrix of weights": lambda d, x: d(aten.linear.default, d.input(5, 8), x),
    "rows one behind the other": lambda d, x: d.reshape(d(aten.cat.default, [x, x]), 2, B, S, 8),
    "rows that are never taken apart": lambda d, x: d(aten.softmax.int, d(aten.linear.default, x, d.parameter(5, 8)), -1),
    "the loss": lambda d, x: d(cross_entropy, x, d.reshape(d.input(B, S, dtype=torch.int64), B * S), -100),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_graph_is_left_alone_where_nothing_is_gained(name: str) -> None:
    d = Drawing()
    program = d.program(ALONE[name](d, d.reshape(d.input(B, S, 8), B * S, 8)))
    assert str(unflattened(program).units[0].body.graph) == str(program.units[0].body.graph)


def test_dropout_keeps_the_same_elements() -> None:
    d = Drawing()
    flat = d(aten.dropout.default, d.reshape(d.input(B, S, 8), B * S, 8), 0.5, True)
    program = d.program(d.reshape(flat, B, S, 8))
    after = unflatten.run(program, CONTEXT)
    assert targets(after) == [dropout]
    found = []
    for each in (program, after):
        for node in each.units[0].body.calls():
            if node.target is dropout:
                assert node.kwargs == {"random": SHARED}
                node.kwargs = {"random": Stream(0, torch.device("cpu"))}
        found.append(results(each))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and bool((found[0][0] == 0).any())


def test_a_value_that_is_rows_and_columns_of_one_product_is_left_alone() -> None:
    d = Drawing()
    x = d.reshape(d.input(2, 4), 8)
    square = d.reshape(d.input(2, 4, 8), 8, 8)
    made = d(aten.mul.Tensor, d(aten.mm.default, square, square), x)
    program = d.program(d.reshape(made, 2, 4, 8))
    assert targets(unflattened(program)) == targets(program)


def test_a_long_run_of_calls_is_followed_to_its_end() -> None:
    d = Drawing()
    flat = d.reshape(d.input(B, S, 8), B * S, 8)
    for _ in range(1500):
        flat = d(aten.neg.default, flat)
    after = unflattened(d.program(d.reshape(flat, B, S, 8)))
    assert targets(after) == [aten.neg] * 1500


MIXING: dict[str, Callable[[Drawing, fx.Node], fx.Node]] = {
    "running sum": lambda d, x: d(aten.cumsum.default, x, 0),
    "apart and back": lambda d, x: d.reshape(d(aten.silu.default, d.reshape(x, B, S, 8)), B * S, 8),
    "apart, mixed and back": lambda d, x: d.reshape(d(aten.cumsum.default, d.reshape(x, B, S, 8), 1), B * S, 8),
    "features apart": lambda d, x: d.reshape(d(aten.neg.default, d.reshape(x, 8 * B * S)), B * S, 8),
    "rows apart otherwise": lambda d, x: d.reshape(d(aten.tanh.default, d.reshape(x, B, 8 * S)), B * S, 8),
}
STEPS = {**{name: step for name, step in ROWS.items()}, **MIXING}


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8),
    st.sets(st.integers(0, 9), max_size=3),
    st.sets(st.integers(0, 9), min_size=1, max_size=3),
)
def test_drawn_graphs_compute_what_they_did(steps: list[tuple[str, int, int]], kept: set[int], apart: set[int]) -> None:
    d = Drawing()
    values = [d.reshape(d.input(B, S, 8), B * S, 8), d.input(B * S, 8)]
    for name, first, second in steps:
        made = STEPS[name](d, values[first % len(values)])
        if value(made).shape == (B * S, 8):
            values.append(d(aten.add.Tensor, made, values[second % len(values)]))
    ends = [d.reshape(values[i % len(values)], B, S, 8) for i in sorted(apart)]
    program = d.program(*ends, *(d(aten.relu.default, values[i % len(values)]) for i in sorted(kept)))
    unflattened(program)


# Models.


@cache
def lowered(kind: str) -> Lowered:
    config = tiny_config(kind)
    policy = Policy.for_model(config.model_type, tensor=2, sequence_parallel=True, precision="fp64")
    return shardcomp.lower(config, policy, seq=16)


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_a_layer_of_merged_rows_or_heads_sends_what_any_layer_does(kind: str) -> None:
    found = lowered(kind)
    assert sent(found, "forward") == sent(found, "backward") == "2 all_gather + 2 reduce_scatter"
    assert not [each for each in found.program.degraded if "gathered" in each.why or "reshape" in each.what]


@pytest.mark.parametrize("kind", ["opt", "bloom"])
def test_the_loss_and_the_count_of_its_labels_are_over_all_tokens(kind: str) -> None:
    program = lowered(kind).record("unflatten").program
    [losses] = [node for node in program.units[0].body.calls() if node.target is cross_entropy]
    assert [value(n).shape[0] for n in losses.args[:2]] == [B * S, B * S]  # type: ignore[arg-type]
    assert merges(program) == [*losses.args[:2], losses]
    tokens = lowered(kind).program.tokens
    assert tokens is not None and tokens.inputs == ("labels",)


BEFORE = """
class Model(Unit):  #
    def forward(self, input_ids, labels, num_items_in_batch):
        w = local(self)
        b = input_ids.size(0)
        s = input_ids.size(1)
        embed: f32[b, s, 8] = aten.embedding(w.embed.weight, input_ids)
        reshape_1: f32[b*s, 8] = embed.reshape(b*s, 8)
        packed: f32[b*s, 24] = linear(reshape_1, w.layers[0].packed.weight)
        chunk_1 = aten.chunk(packed, 2, -1)
        getitem_1: f32[b*s, 12] = chunk_1[0]
        getitem_2: f32[b*s, 12] = chunk_1[1]
        silu_1: f32[b*s, 12] = silu(getitem_1)
        mul_1: f32[b*s, 12] = silu_1 * getitem_2
        down: f32[b*s, 8] = linear(mul_1, w.layers[0].down.weight)
        reshape_2: f32[b, s, 8] = down.reshape(b, s, 8)
        _0: f32[b, s, 8] = embed + reshape_2
        head: f32[b, s, 23] = linear(_0, w.head.weight)
        reshape_3: f32[b*s, 23] = head.reshape(b*s, 23)
        reshape_4: i64[b*s] = labels.reshape(b*s)
        cross_entropy_1: f32[b*s] = cross_entropy(reshape_3, reshape_4, ignore_index=-100)
        sum_1: f32[()] = cross_entropy_1.sum()
        div_1: f32[()] = sum_1 / num_items_in_batch
        return div_1
"""

EXPECTED = """
class Model(Unit):  #
    def forward(self, input_ids, labels, num_items_in_batch):
        w = local(self)
        b = input_ids.size(0)
        s = input_ids.size(1)
        embed: f32[b, s, 8] = aten.embedding(w.embed.weight, input_ids)
        packed: f32[b, s, 24] = linear(embed, w.layers[0].packed.weight)
        chunk_1 = aten.chunk(packed, 2, 2)
        getitem_1: f32[b, s, 12] = chunk_1[0]
        getitem_2: f32[b, s, 12] = chunk_1[1]
        silu_1: f32[b, s, 12] = silu(getitem_1)
        mul_1: f32[b, s, 12] = silu_1 * getitem_2
        down: f32[b, s, 8] = linear(mul_1, w.layers[0].down.weight)
        _0: f32[b, s, 8] = embed + down
        head: f32[b, s, 23] = linear(_0, w.head.weight)
        reshape_1: f32[b*s, 23] = head.reshape(b*s, 23)
        reshape_2: i64[b*s] = labels.reshape(b*s)
        cross_entropy_1: f32[b*s] = cross_entropy(reshape_1, reshape_2, ignore_index=-100)
        sum_1: f32[()] = cross_entropy_1.sum()
        div_1: f32[()] = sum_1 / num_items_in_batch
        return div_1
"""


@pinned_torch
def test_samples_and_tokens_that_a_small_model_merges_stay_apart() -> None:
    lowered = lower_gated_model(layers=1, merges=True)
    assert before_and_after(lowered, "unflatten", "Model") == (BEFORE, EXPECTED)
