"""Packed weights become a parameter for each packed slice: what the pass makes of a packed gate."""

from __future__ import annotations

from support.listings import before_and_after, lower_gated_model, pinned_torch

BEFORE = """
class Model(Unit):  #
    def forward(self, input_ids, labels, num_items_in_batch):
        w = local(self)
        b = input_ids.size(0)
        s = input_ids.size(1)
        embed: f32[b, s, 8] = aten.embedding(w.embed.weight, input_ids)
        packed: f32[b, s, 24] = linear(embed, w.layers[0].packed.weight)
        chunk_1 = aten.chunk(packed, 2, -1)
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

EXPECTED = """
class Model(Unit):  #
    def forward(self, input_ids, labels, num_items_in_batch):
        w = local(self)
        b = input_ids.size(0)
        s = input_ids.size(1)
        embed: f32[b, s, 8] = aten.embedding(w.embed.weight, input_ids)
        embed = self.fan_out(embed)
        linear_2: f32[b, s, 12] = linear(embed, w.layers[0].packed.weight.gate)
        linear_3: f32[b, s, 12] = linear(embed, w.layers[0].packed.weight.up)
        silu_1: f32[b, s, 12] = silu(linear_2)
        mul_1: f32[b, s, 12] = silu_1 * linear_3
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
def test_a_packed_weight_becomes_a_parameter_for_its_gate_and_one_for_its_factor() -> None:
    lowered = lower_gated_model(layers=1, tensor=2)
    assert before_and_after(lowered, "split_packed_weights", "Model") == (BEFORE, EXPECTED)
