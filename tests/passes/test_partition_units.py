"""A model becomes units: alike layers share one class, and each unit takes what it needs by name."""

from __future__ import annotations

from support.listings import class_listing, lower_gated_model, pinned_torch

BEFORE = """
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
        _0 = self.fan_out(_0)
        linear_4: f32[b, s, 12] = linear(_0, w.layers[1].packed.weight.gate)
        linear_5: f32[b, s, 12] = linear(_0, w.layers[1].packed.weight.up)
        silu_2: f32[b, s, 12] = silu(linear_4)
        mul_2: f32[b, s, 12] = silu_2 * linear_5
        down_2: f32[b, s, 8] = linear(mul_2, w.layers[1].down.weight)
        _1: f32[b, s, 8] = _0 + down_2
        head: f32[b, s, 23] = linear(_1, w.head.weight)
        reshape_1: f32[b*s, 23] = head.reshape(b*s, 23)
        reshape_2: i64[b*s] = labels.reshape(b*s)
        cross_entropy_1: f32[b*s] = cross_entropy(reshape_1, reshape_2, ignore_index=-100)
        sum_1: f32[()] = cross_entropy_1.sum()
        div_1: f32[()] = sum_1 / num_items_in_batch
        return div_1
"""

EXPECTED_LAYER = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden = self.fan_out(hidden)
        linear_2: f32[b, s, 12] = linear(hidden, w.packed.weight.gate)
        linear_3: f32[b, s, 12] = linear(hidden, w.packed.weight.up)
        silu_1: f32[b, s, 12] = silu(linear_2)
        mul_1: f32[b, s, 12] = silu_1 * linear_3
        down: f32[b, s, 8] = linear(mul_1, w.down.weight)
        add_1: f32[b, s, 8] = hidden + down
        return add_1
"""

EXPECTED_MODEL = """
class Model(Stage):
    unit_classes = (
        ("embed", First),
        *((f"layers.{i}", Layer) for i in range(0, 2)),
        ("head", Last),
    )

    def forward(self, input_ids, labels, num_items_in_batch):
        hidden = self.units[0](input_ids)
        hidden_1 = self.units[1](hidden)
        hidden_2 = self.units[2](hidden_1)
        loss = self.units[3](hidden_2, labels, num_items_in_batch)
        return {"loss": loss}
"""


@pinned_torch
def test_two_alike_layers_become_one_class_between_the_first_and_the_last_unit() -> None:
    lowered = lower_gated_model()
    assert class_listing(lowered.record("split_packed_weights").listing(), "Model") == BEFORE
    after = lowered.record("partition_units").listing()
    assert class_listing(after, "Layer") == EXPECTED_LAYER
    assert class_listing(after, "Model").startswith(EXPECTED_MODEL)
