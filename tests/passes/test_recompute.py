"""Which layers are computed again, and which calls of theirs are not."""

from __future__ import annotations

import re
from typing import Any

import pytest

import shardcomp
from shardcomp import Policy
from shardcomp.cost.activations import unit_activations
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import DROP, KEEP, LAYER, MARK, Context, Unit
from shardcomp.lowered import Lowered
from shardcomp.passes import recompute
from support.families import tiny_config
from support.listings import before_and_after, lower_gated_model, pinned_torch
from support.models import tiny


def lowered_for(config: Any, policy: str = "llama", **options: Any) -> Lowered:
    return shardcomp.lower(config, Policy.load(policy, **options), seq=16)


def layers(lowered: Lowered) -> list[Unit]:
    return [unit for unit in lowered.program.units if unit.kind == LAYER]


def marks(lowered: Lowered) -> dict[str, str]:
    """name -> keep or drop, as the listing has it."""
    return dict(re.findall(r"^ +(\w+): .* = (keep|drop)\(", lowered.listing(), re.MULTILINE))


@pytest.mark.parametrize(
    ("option", "plans"),
    [
        ("none", ["none"] * 5),
        ("full", ["full"] * 5),
        ("selective", ["selective"] * 5),
        ("every:2", ["full", "none", "full", "none", "full"]),
        ("every:3", ["full", "none", "none", "full", "none"]),
        ("every:9", ["full", "none", "none", "none", "none"]),
    ],
)
def test_the_layers_that_are_computed_again(option: str, plans: list[str]) -> None:
    for pipeline in (1, 2):
        lowered = lowered_for(tiny(num_hidden_layers=5), recompute=option, pipeline=pipeline)
        assert [unit.plan.recompute for unit in layers(lowered)] == plans
        assert {unit.plan.recompute for unit in lowered.program.units if unit.kind != LAYER} == {"none"}
        assert [plan.recompute for plan in lowered.blueprint().units] == [u.plan.recompute for u in lowered.program.units]


def test_layers_that_no_gradient_flows_into_are_not() -> None:
    model = shardcomp.presets.build(tiny(num_hidden_layers=3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.embed_tokens", "model.layers.0", "model.layers.1")))
    plans = [unit.plan.recompute for unit in layers(lowered_for(model, recompute="full"))]
    assert plans == ["none", "none", "none"]  # the last has weights to train, but nothing waits for their gradients
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(True)
    plans = [unit.plan.recompute for unit in layers(lowered_for(model, recompute="full"))]
    assert plans == ["none", "full", "full"]


def test_products_attention_and_their_sums_are_not_run_again() -> None:
    kept = ["q_proj", "k_proj", "v_proj", "attention_1", "gate_proj", "up_proj"]
    one, two = lowered_for(tiny(), recompute="selective"), lowered_for(tiny(), recompute="selective", tensor=2)
    assert marks(one) == {**dict.fromkeys([*kept, "o_proj"], KEEP), "down_proj": DROP}
    thrown = ["o_proj", "down_proj", "down_proj_scattered"]
    assert marks(two) == {**dict.fromkeys([*kept, "o_proj_scattered"], KEEP), **dict.fromkeys(thrown, DROP)}


def test_products_that_are_summed_together_are_kept_as_their_sum() -> None:
    """Attention and MLP side by side: what both add to the layer's result is not needed again."""
    found = marks(lowered_for(tiny_config("gpt_neox", use_parallel_residual=True), "auto", recompute="selective", tensor=2))
    assert {name for name, mark in found.items() if mark == DROP} >= {"dense", "dense_4h_to_h"}


def test_only_the_marked_lines_of_a_listing_differ() -> None:
    plain, selective = (lowered_for(tiny(), recompute=option, tensor=2) for option in ("none", "selective"))
    lines = zip(plain.record("emit").listing().splitlines(), selective.record("pipeline").listing().splitlines(), strict=True)
    assert all(a == b for a, b in lines)  # and the body that the pass before recorded is as it was
    text = re.sub(r"(?:keep|drop)\(([\w.]+), ", r"\1(", selective.listing())
    assert text.replace("    keep,\n", "").replace("    drop,\n", "") == plain.listing()
    full = lowered_for(tiny(), recompute="full", tensor=2)
    assert full.listing() == plain.listing()


@pytest.mark.long  # golden listings show one body
def test_alike_layers_still_share_a_body() -> None:
    few, many = (lowered_for(tiny(num_hidden_layers=n), recompute="selective") for n in (2, 12))
    assert len(few.program.bodies()) == len(many.program.bodies()) == 3
    mixed = lowered_for(tiny(num_hidden_layers=12), recompute="every:4")
    assert len(mixed.program.bodies()) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "falcon_new", "bloom"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_every_mark_saves_bytes_or_work(family: str, tensor: int) -> None:
    """No result is kept that a second run could throw away: keeping none of those that are thrown away is right, and keeping
    them would cost bytes."""
    lowered = lowered_for(tiny_config(family), "auto", tensor=tensor, recompute="selective")
    program, rank = lowered.program, lowered.mesh.coordinates(0)
    unit = layers(lowered)[0]
    least = unit_activations(program, unit, 2, 16, rank).own
    for node in [node for node in unit.body.calls() if node.meta.get(MARK) == DROP]:
        body = unit.body.copy()
        copy = next(each for each in body.calls() if each.name == node.name)
        copy.meta[MARK] = KEEP
        more = Unit(unit.path, unit.kind, body, unit.inputs, unit.outputs, unit.parameters, unit.buffers, unit.plan)
        program.units.append(more)
        assert unit_activations(program, more, 2, 16, rank).own > least
        program.units.remove(more)


def test_the_pass_leaves_what_it_is_given() -> None:
    lowered = lowered_for(tiny(), recompute="none")
    program = lowered.record("pipeline").program
    before = [(id(unit), unit.plan, [dict(node.meta) for node in unit.body.calls()]) for unit in program.units]
    found = recompute.run(program, Context(Mesh(), Policy.load("llama", recompute="selective")))
    assert before == [(id(unit), unit.plan, [dict(node.meta) for node in unit.body.calls()]) for unit in program.units]
    assert any(MARK in node.meta for unit in found.units for node in unit.body.calls())
    assert recompute.run(program, Context(Mesh(), Policy.load("llama"))) is program


BEFORE = """
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

EXPECTED = """
class Layer(Unit):  # layers.0 … 1, alike
    def forward(self, hidden):
        w = local(self)
        hidden_gathered: f32[b, s, 8] = allgather_reducescatter(hidden, dim=1, axis=self.tp)
        hidden_gathered = self.fan_out(hidden_gathered)
        linear_2: f32[b, s, 12/tp] = keep(linear, hidden_gathered, w.packed.weight.gate)
        linear_3: f32[b, s, 12/tp] = keep(linear, hidden_gathered, w.packed.weight.up)
        swiglu_1: f32[b, s, 12/tp] = swiglu(linear_2, linear_3)
        down: f32[b, s, 8] @ partial("tp") = drop(linear, swiglu_1, w.down.weight)
        down_scattered: f32[b, s/tp, 8] = drop(reducescatter_allgather, down, dim=1, axis=self.tp)
        add_1: f32[b, s/tp, 8] = hidden + down_scattered
        return add_1
"""


@pinned_torch
def test_the_products_of_a_layer_are_kept_and_its_last_calls_run_once() -> None:
    lowered = lower_gated_model(tensor=2, recompute="selective")
    assert before_and_after(lowered, "recompute", "Layer") == (BEFORE, EXPECTED)
