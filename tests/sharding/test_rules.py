"""Every rule, one by one: cut the operands along each factor, run each piece, put the results together, compare both
directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import shardcomp.kernels  # registers the kernels' rules
from shardcomp.ir.collectives import Axis
from shardcomp.ir.nodes import tensor_arguments, values
from shardcomp.ir.program import PARAMETER, Value
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.sharding.notation import parse
from shardcomp.sharding.rules import Factoring, factoring

aten = torch.ops.aten
N = 2


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "linear": (aten.linear.default, (f(2, 6, 4), f(8, 4)), {}),
    "linear with bias": (aten.linear.default, (f(2, 6, 4), f(8, 4), f(8)), {}),
    "mm": (aten.mm.default, (f(4, 6), f(6, 8)), {}),
    "bmm": (aten.bmm.default, (f(2, 4, 6), f(2, 6, 8)), {}),
    "addmm": (aten.addmm.default, (f(8), f(4, 6), f(6, 8)), {}),
    "add": (aten.add.Tensor, (f(2, 6, 4), f(2, 6, 4)), {}),
    "add with broadcasting": (aten.add.Tensor, (f(2, 6, 4), f(1, 4)), {}),
    "mul": (aten.mul.Tensor, (f(2, 6, 4), f(4)), {}),
    "div": (aten.div.Tensor, (f(2, 6, 4), f(2, 6, 1)), {}),
    "div by a number": (aten.div.Tensor, (f(2, 4), 3.0), {}),
    "silu": (aten.silu.default, (f(2, 4),), {}),
    "neg": (aten.neg.default, (f(2, 4),), {}),
    "pow": (aten.pow.Tensor_Scalar, (f(2, 4), 2), {}),
    "cast": (aten.to.dtype, (f(2, 4), torch.float32), {}),
    "sum over one dimension": (aten.sum.dim_IntList, (f(2, 6, 4), [1]), {}),
    "sum over all": (aten.sum.default, (f(2, 6),), {}),
    "mean": (aten.mean.dim, (f(2, 6, 4), [-1], True), {}),
    "amax": (aten.amax.default, (f(2, 6, 4), [-1], False), {}),
    "softmax": (aten.softmax.int, (f(2, 6, 4), -1), {}),
    "transpose": (aten.transpose.int, (f(2, 6, 4), 1, 2), {}),
    "permute": (aten.permute.default, (f(2, 6, 4), [2, 0, 1]), {}),
    "unsqueeze": (aten.unsqueeze.default, (f(2, 6), 1), {}),
    "layer norm": (aten.layer_norm.default, (f(2, 6, 4), [4], f(4), f(4)), {}),
    "rms norm": (aten.rms_norm.default, (f(2, 6, 4), [4], f(4)), {}),
    "matmul": (aten.matmul.default, (f(2, 4, 6, 8), f(2, 4, 8, 6)), {}),
    "matmul with broadcasting": (aten.matmul.default, (f(2, 4, 6, 8), f(1, 8, 6)), {}),
    "scaled attention": (
        aten.scaled_dot_product_attention.default,
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 1, 6, 6)),
        {"scale": 0.5},
    ),
    "scaled attention, one key head": (
        aten.scaled_dot_product_attention.default,
        (f(2, 4, 6, 8), f(2, 1, 6, 8), f(2, 1, 6, 8)),
        {},
    ),
    "scaled attention, grouped": (
        aten.scaled_dot_product_attention.default,
        (f(2, 4, 6, 8), f(2, 2, 6, 8), f(2, 2, 6, 8)),
        {"enable_gqa": True},
    ),
    "stack": (aten.stack.default, ([f(2, 6, 4), f(2, 6, 4)], -1), {}),
    "index": (aten.index.Tensor, (f(2, 6, 4), [None, None, torch.tensor([3, 1])]), {}),
    "repeat_interleave": (aten.repeat_interleave.self_int, (f(2, 6, 4), 2, 2), {}),
    "expand": (aten.expand.default, (f(2, 1, 4), [2, 6, 4]), {}),
    "repeat": (aten.repeat.default, (f(2, 3, 4), [1, 2, 1]), {}),
    "repeat along a new dimension": (aten.repeat.default, (f(2, 4), [3, 1, 1]), {}),
    "slice": (aten.slice.Tensor, (f(2, 6, 4), 2, 0, 2), {}),
    "select": (aten.select.int, (f(2, 6, 4), 2, 1), {}),
    "cat": (aten.cat.default, ([f(2, 4), f(2, 6)], -1), {}),
    "pad": (aten.pad.default, (f(2, 4), [0, 1]), {}),
    "heads from features": (aten.reshape.default, (f(2, 6, 8), [2, 6, 4, 2]), {}),
    "features from heads": (aten.reshape.default, (f(2, 6, 4, 2), [2, 6, 8]), {}),
    "tokens from rows": (aten.reshape.default, (f(2, 6, 4), [12, 4]), {}),
    "groups in the middle": (aten.reshape.default, (f(2, 12, 3), [2, 4, 3, 3]), {}),
    "embedding": (aten.embedding.default, (f(9, 4), torch.randint(0, 9, (2, 6))), {}),
    "embedding with padding": (aten.embedding.default, (f(9, 4), torch.tensor([[0, 3, 8], [7, 3, 1]]), 3), {}),
    "cross entropy": (cross_entropy, (f(6, 9), torch.tensor([0, -100, 4, 5, 8, 2]), -100), {}),
    "attention": (attention, (f(2, 4, 6, 4), f(2, 2, 6, 4), f(2, 2, 6, 4)), {"causal": True, "scale": 0.5}),
    "attention with a mask": (
        attention,
        (f(2, 4, 6, 4), f(2, 4, 6, 4), f(2, 4, 6, 4)),
        {"key_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool(), "causal": True},
    ),
}


def node_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Node, list[Tensor]]:
    """The call as a node of a graph, and its tensors in the order that rules count them in."""
    graph = fx.Graph()
    tensors: list[Tensor] = []

    def lift(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        node = graph.placeholder(f"x{len(tensors)}")
        node.meta = {"value": Value(tuple(argument.shape), argument.dtype, True), "role": PARAMETER, "path": "x"}
        tensors.append(argument)
        return node

    lifted = fx.node.map_aggregate(args, lift)
    named = {key: lift(held) for key, held in kwargs.items()}
    node = graph.call_function(target, lifted, named)
    result = target(*args, **kwargs)
    node.meta = {"value": Value(tuple(result.shape), result.dtype, True), "path": ""}
    return node, tensors


def run_local(node: fx.Node, pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    given = dict(zip(tensor_arguments(node), pieces, strict=True))
    args = fx.map_arg(node.args, lambda n: given[n])
    if node.target in (aten.reshape.default, aten.expand.default):
        args = (args[0], list(shape))
    return node.target(*args, **fx.map_arg(dict(node.kwargs), lambda n: given[n]))


def cut(tensor: Tensor, dims: tuple[str | None, ...], factor: str, n: int) -> list[Tensor]:
    if factor not in dims:
        return [tensor.clone() for _ in range(n)]
    return [piece.clone() for piece in tensor.chunk(n, dims.index(factor))]


def divides(rule: Factoring, factor: str, shapes: list[tuple[int, ...]]) -> bool:
    every = zip((*rule.operands, *rule.results), shapes, strict=True)
    return all(shape[dims.index(factor)] % N == 0 for dims, shape in every if factor in dims)


def plain_factors() -> list[tuple[str, str]]:
    found = []
    for name, (target, args, kwargs) in CASES.items():
        node, tensors = node_of(target, args, kwargs)
        rule = factoring(node)
        assert rule is not None, name
        shapes = [tuple(t.shape) for t in tensors] + [v.shape for v in values(node)]
        for factor in rule.factors():
            contracted = all(factor not in dims for dims in rule.results)
            if factor in rule.forms or (contracted and (rule.additive or not rule.linear)):
                continue
            if divides(rule, factor, shapes):
                found.append((name, factor))
    return found


@pytest.mark.parametrize(("name", "factor"), plain_factors())
def test_pieces_of_the_operands_give_pieces_of_the_result(name: str, factor: str) -> None:
    target, args, kwargs = CASES[name]
    node, tensors = node_of(target, args, kwargs)
    rule = factoring(node)
    assert rule is not None
    whole = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    result = run_local(node, whole, tuple(values(node)[0].shape))
    seed = torch.randn_like(result)
    result.backward(seed)

    dims = rule.results[0]
    local = tuple(size // N if d == factor else size for size, d in zip(result.shape, dims, strict=True))
    cuts = [cut(t, d, factor, N) for t, d in zip(tensors, rule.operands, strict=True)]
    seeds = cut(seed, dims, factor, N)
    made, gradients = [], []
    for i in range(N):
        pieces = [each[i].requires_grad_(each[i].is_floating_point()) for each in cuts]
        made.append(run_local(node, pieces, local))
        made[-1].backward(seeds[i])
        gradients.append([piece.grad for piece in pieces])

    joined = torch.cat(made, dims.index(factor)) if factor in dims else torch.stack(made).sum(0)
    torch.testing.assert_close(joined, result)
    for j, (tensor, operand) in enumerate(zip(whole, rule.operands, strict=True)):
        if tensor.grad is None:
            continue
        parts = [gradient[j] for gradient in gradients]
        # The law of gradients: an operand that the factor does not cut has one summand of its gradient on each rank.
        total = torch.cat(parts, operand.index(factor)) if factor in operand else torch.stack(parts).sum(0)
        torch.testing.assert_close(total, tensor.grad)


def linear_operands() -> list[tuple[str, int]]:
    found = []
    for name, (target, args, kwargs) in CASES.items():
        node, tensors = node_of(target, args, kwargs)
        rule = factoring(node)
        assert rule is not None
        found += [(name, i) for i in rule.linear] if not rule.additive else []
        found += [(name, -1)] if rule.jointly_linear else []
    return found


@pytest.mark.parametrize(("name", "index"), linear_operands())
def test_summands_pass_through_what_is_called_linear(name: str, index: int) -> None:
    target, args, kwargs = CASES[name]
    node, tensors = node_of(target, args, kwargs)
    shape = tuple(values(node)[0].shape)
    parts = [t * 0.3 if index in (-1, i) else t for i, t in enumerate(tensors)]
    rest = [t * 0.7 if index in (-1, i) else t for i, t in enumerate(tensors)]
    total = run_local(node, parts, shape) + run_local(node, rest, shape)
    torch.testing.assert_close(total, run_local(node, tensors, shape))


def test_no_operator_is_called_linear_that_is_not() -> None:
    for name in ("silu", "pow", "amax", "softmax", "cast", "cross entropy"):
        node, _ = node_of(*CASES[name])
        rule = factoring(node)
        assert rule is not None and not rule.linear and not rule.jointly_linear, name


@pytest.mark.parametrize("name", ["embedding", "embedding with padding"])
def test_the_split_embedding_sums_to_the_whole_one_with_its_gradient(name: str) -> None:
    target, args, kwargs = CASES[name]
    weight, ids = args[:2]
    padding = args[2] if len(args) > 2 else -1
    whole = weight.clone().requires_grad_()
    result = target(whole, ids, *args[2:])
    seed = torch.randn_like(result)
    result.backward(seed)
    pieces = [piece.clone().requires_grad_() for piece in weight.chunk(N)]
    made = [shardcomp.kernels.vocab_embedding(p, ids, padding, weight.shape[0], Axis("tp", N, i)) for i, p in enumerate(pieces)]
    torch.testing.assert_close(sum(made), result)
    for part in made:
        part.backward(seed)
    torch.testing.assert_close(torch.cat([p.grad for p in pieces]), whole.grad)


def test_an_unknown_operator_has_no_rule() -> None:
    node, _ = node_of(aten.tril.default, (f(4, 4),), {})
    assert factoring(node) is None


@pytest.mark.parametrize("line", ["i, o i", "i -> o | joint 0", "I -> o", "i -> o-1"])
def test_a_malformed_line_says_what_is_wrong(line: str) -> None:
    with pytest.raises(ValueError, match="'"):
        parse(line)


def test_the_notation_reads_ellipsis_whole_factors_added_operands_and_keywords() -> None:
    parsed = parse("... i, o i, +o, mask: b k! -> ... o | linear 0")
    assert parsed.operands[0].dims == ("...", "i")
    assert parsed.operands[2].additive
    assert parsed.operands[3].keyword == "mask"
    assert parsed.linear == {0}
