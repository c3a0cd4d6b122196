"""The table of operators: what each query gives, written out."""

from __future__ import annotations

import operator

import pytest
import torch

from shardcomp.ir import operators
from shardcomp.ir.operators import FACTS, FAMILIES, OPERATORS
from shardcomp.kernels import (
    attention,
    dropout,
    dropped_attention,
    linear_cross_entropy,
    vocab_embedding,
    vocab_linear_cross_entropy,
)
from shardcomp.kernels.counts import NAMES
from shardcomp.sharding import leading_dims, rules

aten = torch.ops.aten
SPLITS = {aten.split, aten.chunk, aten.split_with_sizes, aten.unbind}

FAMILY = {
    "norm": {aten.layer_norm, aten.rms_norm},
    "dropout": {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout},
    "split": SPLITS,
    "attention": {aten.scaled_dot_product_attention},
    "matmul": {aten.linear, aten.mm, aten.addmm, aten.matmul, aten.bmm, aten.baddbmm, aten.mv, aten.dot},
}
FACT = {
    "bijective": {aten.reshape, aten.transpose, aten.permute, aten.unsqueeze},
    "selects": {aten.slice, aten.select, aten.index, *SPLITS},
    "moves": {
        *(aten.reshape, aten.transpose, aten.permute, aten.unsqueeze, aten.expand, aten.slice, aten.select),
        *(aten.cat, aten.stack, aten.repeat_interleave, *SPLITS),
    },
    "same_numbers": {
        *(aten.slice, aten.select, aten.narrow, aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze),
        *(aten.squeeze, aten.transpose, aten.permute, aten.expand, aten.contiguous, aten.clone, aten.to, aten.roll),
        *(aten.constant_pad_nd, aten.pad, aten.masked_fill, aten.slice_scatter, aten.select_scatter),
    },
    "token_index": {aten.reshape, aten.to, aten.unsqueeze, aten.expand, aten.slice},
    "may_copy": {aten.reshape, aten.flatten, aten.contiguous, aten.detach},
    "moment": {aten.mean, aten.var, aten.sum},
    "root": {aten.rsqrt, aten.sqrt, aten.reciprocal},
    "activation": {
        *(aten.silu, aten.gelu, aten.sigmoid, aten.tanh, aten.relu, aten.erf, aten.exp, aten.elu, aten.mish, aten.softplus),
    },
    "makes_logits": {linear_cross_entropy, vocab_linear_cross_entropy},
    "mixes_tokens": {aten.softmax, aten._safe_softmax, aten.scaled_dot_product_attention, attention},
}
BECOMES = {
    "operand": {aten.contiguous, aten.clone, aten.alias, aten.lift_fresh, aten.lift_fresh_copy},
    "to": {aten.to, aten._to_copy, aten.type_as},
    "reshape": {
        *(aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.view_as),
        *(aten.reshape_as, aten.ravel),
    },
    "expand": {aten.expand, aten.expand_as, aten.broadcast_to},
    "linear": {aten.addmm, aten.mm, aten.matmul, aten.baddbmm},
}
BACKWARD = {
    "others": {aten.linear, aten.mm, aten.bmm, aten.addmm, aten.matmul, aten.mul},
    "indices": {aten.embedding, aten.index, vocab_embedding},
    "nothing": {aten.to, aten._to_copy, dropout},
}
PRINTED = {
    "+": {aten.add},
    "-": {aten.sub},
    "*": {aten.mul},
    "/": {aten.div},
    "minus": {aten.neg},
    "sizes": {aten.reshape, aten.expand},
    "function": {aten.linear, aten.silu, aten.gelu, aten.relu},
    "method": {
        *(aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.pow, aten.mean, aten.sum, aten.rsqrt, aten.sqrt),
        *(aten.cos, aten.sin, aten.tanh, aten.exp, aten.sigmoid, aten.cumsum, aten.ne, aten.eq, aten.lt, aten.le, aten.gt),
        *(aten.ge, aten.log, aten.diff, aten.detach, aten.clone, aten.to),
    },
}
ROWS = {
    "pointwise": {dropout, aten.to, aten.detach, aten.where, aten.masked_fill},
    "norm": {aten.layer_norm, aten.rms_norm},
    "pad": {aten.pad, aten.constant_pad_nd},
    "matmul": {aten.mm, aten.bmm, aten.matmul},
    "along 1": {
        *(aten.softmax, aten.log_softmax, aten.cumsum, aten.flip, aten.slice, aten.select, aten.cat, aten.sum, aten.mean),
        *(aten.amax, aten.amin, aten.var, aten.any, aten.unbind),
    },
    "along 2": {aten.split, aten.chunk, aten.split_with_sizes, aten.repeat_interleave, aten.roll},
    "along 1 new": {aten.unsqueeze, aten.stack},
    "linear": {aten.linear},
    "transpose": {aten.transpose},
    "permute": {aten.permute},
    "expand": {aten.expand},
    "by row": {operator.getitem},
}


@pytest.mark.parametrize("family", FAMILY)
def test_the_operators_of_torch_in_a_family(family: str) -> None:
    assert operators.of_family(family, fused=False) == FAMILY[family]


@pytest.mark.parametrize("fact", FACTS)
def test_the_operators_of_which_a_fact_holds(fact: str) -> None:
    assert operators.with_fact(fact) == FACT[fact]


@pytest.mark.parametrize("form", BECOMES)
def test_what_becomes_one_canonical_form(form: str) -> None:
    assert operators.becoming(form) == BECOMES[form]


@pytest.mark.parametrize("what", BACKWARD)
def test_what_a_backward_reads(what: str) -> None:
    assert operators.backward_reading(what) == BACKWARD[what]


@pytest.mark.parametrize("style", PRINTED)
def test_how_the_listing_writes_an_operator(style: str) -> None:
    assert {target for target, row in OPERATORS.items() if row.prints == style} == PRINTED[style]


@pytest.mark.parametrize("name", ROWS)
def test_which_rule_keeps_rows_apart(name: str) -> None:
    assert {target for target, row in OPERATORS.items() if row.rows == name} == ROWS[name]


def test_attention_is_torchs_and_two_kernels() -> None:
    assert operators.of_family("attention") == {attention, dropped_attention, aten.scaled_dot_product_attention}


def test_sparse_embeddings_and_products_without_a_rule() -> None:
    sparse = {target: row.sparse for target, row in OPERATORS.items() if row.sparse is not None}
    assert sparse == {aten.embedding: 4, aten.embedding_bag: 5, aten._embedding_bag: 5}
    contracts = {target: row.contracts for target, row in OPERATORS.items() if row.contracts is not None}
    assert contracts == {aten.matmul: 0, aten.mv: 0, aten.dot: 0, aten.baddbmm: 1}


def test_every_name_in_the_table_is_a_rule() -> None:
    for row in OPERATORS.values():
        assert not row.rows or row.rows in leading_dims._NAMED
        assert not row.rule or "->" in row.rule or row.rule in rules._NAMED
    assert {target for target, row in OPERATORS.items() if row.rule} <= rules.RULES.keys()


def test_kernels_are_counted_in_the_order_of_their_families() -> None:
    order = (
        *("rms_norm", "add_rms_norm", "layer_norm", "rotary", "swiglu", "geglu", "attention", "cross_entropy"),
        "linear_cross_entropy",
    )
    assert tuple(name for name in NAMES if name in order) == order


def test_an_unknown_word_is_refused() -> None:
    assert "view" in FAMILIES
    for query in (operators.of_family, operators.with_fact):
        with pytest.raises(ValueError, match="no such"):
            query("veiw")
