"""Layouts and collectives: what the pass makes of a gated layer under tensor and sequence parallelism."""

from __future__ import annotations

from support.listings import before_and_after, lower_gated_model, pinned_torch

BEFORE = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden = self.fan_out(hidden)
        linear_2: f32[b, s, 12] = linear(hidden, w.packed.weight.gate)
        linear_3: f32[b, s, 12] = linear(hidden, w.packed.weight.up)
        swiglu_1: f32[b, s, 12] = swiglu(linear_2, linear_3)
        down: f32[b, s, 8] = linear(swiglu_1, w.down.weight)
        add_1: f32[b, s, 8] = hidden + down
        return add_1
"""

EXPECTED = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden_gathered: f32[b, s, 8] = allgather_reducescatter(hidden, dim=1, axis=self.tp)
        hidden_gathered = self.fan_out(hidden_gathered)
        linear_2: f32[b, s, 12/tp] = linear(hidden_gathered, w.packed.weight.gate)
        linear_3: f32[b, s, 12/tp] = linear(hidden_gathered, w.packed.weight.up)
        swiglu_1: f32[b, s, 12/tp] = swiglu(linear_2, linear_3)
        down: f32[b, s, 8] @ partial("tp") = linear(swiglu_1, w.down.weight)
        down_scattered: f32[b, s/tp, 8] = reducescatter_allgather(down, dim=1, axis=self.tp)
        add_1: f32[b, s/tp, 8] = hidden + down_scattered
        return add_1
"""


@pinned_torch
def test_a_layer_gathers_its_input_and_scatters_its_partial_result() -> None:
    lowered = lower_gated_model(tensor=2)
    assert before_and_after(lowered, "tensor_parallel", "Layer") == (BEFORE, EXPECTED)
