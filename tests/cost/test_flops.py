"""Operations and traffic of single calls and of a model, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

import shardcomp
from shardcomp.cost.flops import Compute, Share, Work, of_node, of_units
from shardcomp.ir.collectives import allgather_reducescatter
from shardcomp.ir.layout import Layout, split
from shardcomp.ir.program import INPUT, B, S, Value
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.kernels.linear_cross_entropy import linear_cross_entropy
from support.models import tiny

aten = torch.ops.aten
TWO = Share({"pp": 1, "dp": 1, "cp": 1, "tp": 2})


def tensor(*shape: Any, grad: bool = True, dtype: torch.dtype = torch.bfloat16, dim: int | None = None) -> Value:
    layout = Layout() if dim is None else Layout().put("tp", split(dim))
    return Value(shape, dtype, grad and dtype.is_floating_point, layout)


def cost(target: Any, operands: list[Value], result: Value, *rest: Any, share: Share | None = None, **settings: Any) -> Compute:
    """What a call of `target` on such operands costs."""
    graph = fx.Graph()
    nodes = []
    for i, held in enumerate(operands):
        node = graph.placeholder(f"x{i}")
        node.meta = {"role": INPUT, "path": node.name, "value": held}
        nodes.append(node)
    call = graph.call_function(target, (*nodes, *rest), settings)
    call.meta = {"path": "", "value": result}
    return of_node(call, share)


def test_a_linear_costs_two_operations_for_each_element_of_its_weight_and_token() -> None:
    found = cost(aten.linear.default, [tensor(B, S, 6), tensor(10, 6)], tensor(B, S, 10))
    assert found.forward == Work(2 * B * S * 6 * 10, 0, 2 * (6 * B * S + 60 + 10 * B * S))
    assert found.backward.products == 4 * B * S * 6 * 10
    assert sympy.expand(found.backward.bytes - 2 * found.forward.bytes) == 0


@pytest.mark.parametrize(("graded", "times"), [((True, False), 1), ((False, True), 1), ((False, False), 0)])
def test_a_backward_is_only_for_operands_that_need_a_gradient(graded: tuple[bool, bool], times: int) -> None:
    operands = [tensor(B, S, 6, grad=graded[0]), tensor(10, 6, grad=graded[1])]
    found = cost(aten.linear.default, operands, tensor(B, S, 10, grad=any(graded)))
    assert found.backward.products == times * 2 * B * S * 60


@pytest.mark.parametrize(
    ("operands", "result", "products"),
    [
        ([tensor(B, 4, S, 8), tensor(B, 4, 8, S)], tensor(B, 4, S, S), 2 * B * 4 * S * 8 * S),
        ([tensor(B, 4, S, 8), tensor(8, 3)], tensor(B, 4, S, 3), 2 * B * 4 * S * 8 * 3),
        ([tensor(B, S, 8), tensor(8)], tensor(B, S), 2 * B * S * 8),
    ],
)
def test_a_matmul_costs_the_product_of_all_its_dimensions(operands: list[Value], result: Value, products: Any) -> None:
    found = cost(aten.matmul.default, operands, result)
    assert sympy.expand(found.forward.products - products) == 0
    assert sympy.expand(found.backward.products - 2 * products) == 0


@pytest.mark.parametrize(
    ("target", "settings"), [(attention, {"causal": True}), (aten.scaled_dot_product_attention.default, {})]
)
def test_attention_is_counted_in_full(target: Any, settings: dict[str, Any]) -> None:
    operands = [tensor(B, 4, S, 8), tensor(B, 2, S, 8), tensor(B, 2, S, 16)]
    found = cost(target, operands, tensor(B, 4, S, 16), **settings)
    assert sympy.expand(found.forward.products - 2 * B * 4 * S * S * (8 + 16)) == 0
    assert sympy.expand(found.backward.products - 2 * found.forward.products) == 0


def test_everything_else_costs_one_operation_for_each_element_of_its_result() -> None:
    assert cost(aten.mul.Tensor, [tensor(B, S, 6), tensor(6)], tensor(B, S, 6)).forward == Work(0, 6 * B * S, 24 * B * S + 12)
    ids = tensor(B, S, dtype=torch.int64)
    looked_up = cost(aten.embedding.default, [tensor(1000, 6), ids], tensor(B, S, 6)).forward
    assert (looked_up.products, looked_up.others, looked_up.bytes) == (0, 6 * B * S, 24 * B * S + 8 * B * S)
    assert (
        cost(cross_entropy, [tensor(B * S, 97), tensor(B * S, dtype=torch.int64)], tensor(B * S), -100).forward.others
        == 97 * B * S
    )
    assert cost(aten.add.Tensor, [ids, ids], ids) == Compute(Work(0, 0, 24 * B * S))


@pytest.mark.parametrize("early", [True, False])
def test_a_head_that_makes_its_logits_again_costs_one_product_more(early: bool) -> None:
    operands = [tensor(B, S, 6), tensor(97, 6), tensor(B * S, dtype=torch.int64), tensor(dtype=torch.int64)]
    found = cost(linear_cross_entropy, operands, tensor(), ignore_index=-100, early=early)
    assert sympy.expand(found.forward.products - 2 * B * S * 6 * 97) == 0
    assert sympy.expand(found.backward.products - (2 if early else 3) * found.forward.products) == 0
    assert sympy.expand(found.forward.others - 97 * B * S) == 0
    around = 2 * (6 * B * S + 97 * 6) + 8 * B * S + 8 + 2
    assert sympy.expand(found.forward.bytes - around - 2 * 2 * 97 * B * S) == 0


def test_views_and_messages_cost_nothing_but_a_cast_does() -> None:
    held = tensor(B, S, 6)
    assert cost(aten.transpose.int, [held], tensor(B, 6, S), 1, 2) == Compute()
    assert cost(allgather_reducescatter, [tensor(B, S, 6, dim=1)], held, 1, "tp") == Compute()
    cast = cost(aten.to.dtype, [held], tensor(B, S, 6, dtype=torch.float32), torch.float32)
    assert cast.forward == Work(0, 6 * B * S, 36 * B * S)


def test_a_rank_has_its_share_of_what_is_split_and_all_of_what_is_whole() -> None:
    whole = [tensor(B, S, 6), tensor(10, 6)]
    assert cost(aten.linear.default, whole, tensor(B, S, 10), share=TWO).forward.products == 120 * B * S
    column = [tensor(B, S, 6), tensor(10, 6, dim=0)]
    assert cost(aten.linear.default, column, tensor(B, S, 10, dim=2), share=TWO).forward.products == 60 * B * S
    row = [tensor(B, S, 6, dim=2), tensor(10, 6, dim=1)]
    assert cost(aten.linear.default, row, tensor(B, S, 10), share=TWO).forward.products == 60 * B * S
    uneven = [tensor(B, S, 6), tensor(7, 6, dim=0)]
    for rank, rows in ((0, 4), (1, 3)):
        share = Share(TWO.sizes, {"tp": rank})
        assert cost(aten.linear.default, uneven, tensor(B, S, 7, dim=2), share=share).forward.products == 2 * 6 * rows * B * S
    heads = [tensor(B, n, S, 8, dim=1) for n in (4, 2, 2)]
    assert cost(attention, heads, tensor(B, 4, S, 8, dim=1), share=TWO).forward.products == 2 * B * 2 * S * S * 16
    stream = [tensor(B, S, 6, dim=1), tensor(6)]
    assert cost(aten.mul.Tensor, stream, tensor(B, S, 6, dim=1), share=TWO).forward.others == 3 * B * S


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_costs_attention_and_six_operations_per_weight_and_token(ranks: int) -> None:
    config = tiny(num_hidden_layers=3, vocab_size=96)
    lowered = shardcomp.lower(config, shardcomp.Policy.load("llama", tensor=ranks), seq=16)
    program = lowered.program
    weights = sum(
        p.shape[0] * p.shape[1] for p in program.parameters.values() if len(p.shape) == 2 and "embed_tokens" not in p.name
    )
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    forward = 2 * weights * B * S + 3 * 4 * B * heads * S**2 * size
    for record in lowered.records[4:]:
        found = of_units(record.program.units)
        assert sympy.expand(found.forward.products - forward) == 0, record.name
        assert sympy.expand(found.backward.products - 2 * forward) == 0, record.name
    local = of_units(program.units, Share(program.mesh.as_dict()))
    assert sympy.expand(local.forward.products - forward / ranks) == 0
    asked = lowered.report()["flops"]
    expected = (3 * forward / ranks).subs({B: 1, S: 16})
    assert (asked["model"], asked["hardware"]) == (expected, expected)
