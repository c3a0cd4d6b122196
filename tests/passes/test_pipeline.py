"""Stages: where the model is cut, what crosses the cuts, and that stages one after the other are the model."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn

import shardcomp
from shardcomp.ir.collectives import allgather_split, split_allgather
from shardcomp.ir.layout import Layout, split
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import (
    BUFFER,
    INPUT,
    PARAMETER,
    PRELUDE,
    B,
    Body,
    Buffer,
    Parameter,
    Program,
    S,
    Signature,
    Unit,
    Value,
    stage_program,
)
from shardcomp.ir.well_formed import check_program
from shardcomp.lowered import Lowered
from shardcomp.passes import pipeline
from shardcomp.policy.options import Options
from shardcomp.runtime import world
from shardcomp.runtime.allocation import local_index
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.random import Streams
from shardcomp.runtime.unit import UnitParameters
from shardcomp.verification.thread_ranks import run_ranks
from support.families import tiny_config
from support.listings import before_and_after, lower_gated_model, pinned_torch
from support.models import tiny

aten = torch.ops.aten

# Where the cuts are.


def test_the_largest_stage_is_as_small_as_any_cut_makes_it() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice((1.0, 2.0, draw.uniform(0.1, 9))) for _ in range(draw.randint(1, 8))]
        stages = draw.randint(1, len(costs))
        ends = pipeline.balance(costs, stages)
        assert ends[-1] == len(costs) and all(a < b for a, b in itertools.pairwise([0, *ends]))
        every = [[*cut, len(costs)] for cut in itertools.combinations(range(1, len(costs)), stages - 1)]
        assert largest(costs, ends) == pytest.approx(min(largest(costs, each) for each in every))


def largest(costs: list[float], ends: list[int]) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends]))


def test_stages_beside_the_slowest_are_even() -> None:
    assert pipeline.balance([1.0] * 6 + [50.0], 4) == [2, 4, 6, 7]


def test_a_large_head_takes_layers_from_its_stage() -> None:
    def layers(vocabulary: int) -> list[int]:
        config = tiny(num_hidden_layers=8, vocab_size=vocabulary)
        units = lower(config, "llama", 1, 2).program.units
        return [sum(u.kind == "layer" and u.plan.stage == stage for u in units) for stage in (0, 1)]

    assert layers(16) == [4, 4]
    assert layers(5000)[1] < 4


def lower(config: Any, policy: str, tensor: int, stages: int, **options: Any) -> Lowered:
    loaded = shardcomp.Policy.load(policy, tensor=tensor, pipeline=stages, precision="fp64", **options)
    return shardcomp.lower(config, loaded, seq=16)


@pytest.mark.long  # a large head moves layers as well
def test_layers_that_run_again_cost_more_beside_a_head_that_does_not() -> None:
    config = tiny(vocab_size=2400, num_hidden_layers=8)

    def layers(recompute: str) -> list[int]:
        lowered = shardcomp.lower(config, shardcomp.Policy.load("llama", pipeline=2, recompute=recompute), seq=64)
        return [sum(unit.kind == "layer" for unit in lowered.program.in_stages((stage,))) for stage in range(2)]

    assert layers("none") == [7, 1] and layers("full") == [6, 2]
    assert layers("none")[0] >= layers("selective")[0] >= layers("full")[0]


def test_layers_are_in_the_stages_that_were_asked_for() -> None:
    found = lower(tiny(num_hidden_layers=5), "llama", 1, 3, stage_layers=(1, 3, 1)).program
    units = [[unit.path for unit in found.in_stages((stage,)) if unit.kind != PRELUDE] for stage in range(3)]
    names = [f"model.layers.{i}" for i in range(5)]
    assert units == [["model.embed_tokens", names[0]], names[1:4], [names[4], "lm_head"]]


def test_every_call_of_a_model_is_cut_alike() -> None:
    lowered = lower(tiny(num_hidden_layers=5, vocab_size=3000), "llama", 1, 2)
    call = ((("input_ids", 2),), ("logits",), False)
    blueprints = (lowered.blueprint(), lowered.for_call(call, (1, 16)))
    layers = [{unit.path: unit.stage for unit in each.units if unit.parameters} for each in blueprints]
    assert layers[0] == layers[1] and set(layers[0].values()) == {0, 1}
    assert lowered.policy.options.stage_layers is None


def test_a_plan_without_a_pipeline_is_left_as_it_is() -> None:
    lowered = lower(tiny(), "llama", 2, 1)
    assert lowered.record("pipeline").program is lowered.record("tensor").program
    assert list(lowered.program.source) == ["model.py"]


def test_units_between_layers_go_with_the_layer_behind_them_and_earlier_records_stay() -> None:
    program = by_hand()
    context: Any = SimpleNamespace(policy=SimpleNamespace(options=Options(pipeline=3)), batch=2, length=4)
    before = [(unit.plan, unit.inputs, unit.body) for unit in program.units]
    found = pipeline.run(program, context)
    assert [(unit.plan, unit.inputs, unit.body) for unit in program.units] == before
    stages = [[unit.path for unit in found.in_stages((i,)) if unit.kind != PRELUDE] for i in range(3)]
    assert stages == [["first", "layers.0"], ["between", "layers.1"], ["layers.2", "last"]]
    check_program(found, {"layouts", "stages"}, "pipeline")


# What crosses the cuts.


def by_hand() -> Program:
    """Three layers, with values of every kind made by the first units and used by the last.

    table: from a buffer and the caller's sizes, by way of another unit's positions. choice: whole numbers that come from a
    parameter. noise: a random draw. joined: what a message brings. half: a rank's piece, without a message.
    """
    hidden = Value((B, S, 6), torch.float32, True)
    values = {
        "ids": Value((B, S), torch.int64),
        "hidden": hidden,
        "positions": Value((S,), torch.int64),
        "table": Value((S,), torch.float32),
        "choice": Value((B, S), torch.int64),
        "noise": Value((S,), torch.float32),
        "joined": Value((B, S), torch.int64),
        "half": Value((B, S), torch.int64, layout=Layout().put("tp", split(1))),
        **{f"hidden_{i}": hidden for i in range(1, 5)},
        "result": hidden,
    }
    parameters = {"first.weight": Parameter("first.weight", (11, 6), torch.float32)}
    units = [
        unit(
            "first", "first", ("ids",), ("hidden", "positions", "choice", "noise", "joined", "half"), first, values, parameters
        ),
        unit("layers.0", "layer", ("hidden", "positions"), ("hidden_1", "table"), tabling, values, {}, ("scale",)),
        unit("between", "other", ("hidden_1", "table"), ("hidden_2",), adding, values, {}),
        unit("layers.1", "layer", ("hidden_2", "positions"), ("hidden_3",), adding, values, {}),
        unit("layers.2", "layer", ("hidden_3", "table"), ("hidden_4",), adding, values, {}),
        unit("last", "last", ("hidden_4", "choice", "noise", "joined", "half"), ("result",), ending, values, {}),
    ]
    return Program(
        name="Net",
        signature=Signature((("ids", 2),), ("result", "hidden")),
        units=units,
        inputs={"ids": values["ids"]},
        outputs={"result": "result", "hidden": "hidden_1"},
        values=values,
        parameters=parameters,
        buffers={"scale": Buffer("scale", torch.tensor(0.5))},
        mesh=Mesh(pp=3, tp=2),
    )


Call = Callable[..., fx.Node]


def unit(
    path: str,
    kind: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    write: Callable[..., list[fx.Node]],
    values: dict[str, Value],
    parameters: dict[str, Parameter],
    buffers: tuple[str, ...] = (),
) -> Unit:
    """A unit whose code `write(call, *placeholders)` writes."""
    graph = fx.Graph()

    def placeholder(name: str, role: str, held: Value) -> fx.Node:
        node = graph.placeholder(name.replace(".", "_"))
        node.meta = {"role": role, "path": name, "value": held}
        return node

    def call(target: Any, *args: Any, like: Value, **settings: Any) -> fx.Node:
        node = graph.call_function(target, args, settings)
        node.meta = {"path": "", "value": like}
        return node

    given = [placeholder(name, INPUT, values[name]) for name in inputs]
    given += [placeholder(name, PARAMETER, Value(p.shape, p.dtype, True)) for name, p in parameters.items()]
    given += [placeholder(name, BUFFER, Value((), torch.float32)) for name in buffers]
    results = write(call, *given)
    graph.output(tuple(results))
    body = Body(path.replace(".", "_").title(), graph)
    return Unit(path, kind, body, inputs, outputs, tuple(parameters), buffers)


def first(call: Call, ids: fx.Node, weight: fx.Node) -> list[fx.Node]:
    whole, row = Value((B, S), torch.int64), Value((S,), torch.float32)
    hidden = call(aten.embedding.default, weight, ids, like=Value((B, S, 6), torch.float32, True))
    positions = call(aten.arange.default, S, like=Value((S,), torch.int64))
    choice = call(aten.argmax.default, hidden, -1, like=whole)
    noise = call(aten.rand.default, [S], like=row)
    half = call(split_allgather, ids, 1, "tp", like=replace(whole, layout=Layout().put("tp", split(1))))
    joined = call(allgather_split, half, 1, "tp", like=whole)
    return [hidden, positions, choice, noise, joined, half]


def tabling(call: Call, hidden: fx.Node, positions: fx.Node, scale: fx.Node) -> list[fx.Node]:
    table = call(aten.mul.Tensor, positions, scale, like=Value((S,), torch.float32))
    return [call(aten.add.Tensor, hidden, hidden, like=hidden.meta["value"]), table]


def adding(call: Call, hidden: fx.Node, table: fx.Node) -> list[fx.Node]:
    column = call(aten.unsqueeze.default, table, 1, like=replace(table.meta["value"], shape=(S, 1)))
    return [call(aten.add.Tensor, hidden, column, like=hidden.meta["value"])]


def ending(call: Call, hidden: fx.Node, *others: fx.Node) -> list[fx.Node]:
    total = hidden
    for other in others:
        last = call(aten.sum.default, other, like=Value((), torch.float32))
        total = call(aten.add.Tensor, total, last, like=hidden.meta["value"])
    return [total]


def cut(program: Program, **options: Any) -> Program:
    context: Any = SimpleNamespace(policy=SimpleNamespace(options=Options(pipeline=3, **options)), batch=2, length=4)
    return pipeline.run(program, context)


def test_what_cannot_be_computed_again_is_passed_from_stage_to_stage() -> None:
    found = cut(by_hand())
    through = ("choice", "noise", "joined")
    assert found.received(0) == () and found.sent(2) == ()
    # hidden_1 is a result of the model's, so it is passed on to the last stage
    assert found.sent(0) == found.received(1) == (*through, "hidden_1")
    assert found.sent(1) == found.received(2) == (*through, "hidden_1", "hidden_3")


def test_what_comes_from_sizes_and_buffers_alone_is_computed_again() -> None:
    found = cut(by_hand())
    second, third = ([u for u in found.in_stages((i,)) if u.kind == PRELUDE] for i in (1, 2))
    assert [(u.inputs, u.outputs, u.buffers) for u in second] == [
        (("ids",), ("positions_1",), ()),
        (("positions_1",), ("table_1",), ("scale",)),
    ]
    assert [(u.inputs, u.outputs) for u in third] == [
        (("ids",), ("positions_2", "half_1")),
        (("positions_2",), ("table_2",)),
    ]
    assert second[1].body is third[1].body, "alike preludes share a body"
    assert [node.target for node in second[0].body.calls()] == [aten.arange.default], "dead code is gone"
    readers = {u.path: u.inputs for u in found.units}
    assert readers["between"] == ("hidden_1", "table_1") and readers["layers.1"] == ("hidden_2", "positions_1")
    assert readers["layers.2"] == ("hidden_3", "table_2") and readers["last"][-1] == "half_1"


def test_a_program_of_one_stage_has_what_it_receives_and_the_inputs_it_uses() -> None:
    found = cut(by_hand())
    stages = [stage_program(found, i) for i in range(3)]
    assert list(stages[0].inputs) == ["ids"]
    assert list(stages[1].inputs) == [*found.received(1), "ids"]
    assert list(stages[1].outputs) == [*found.sent(1)] and stages[2].outputs == found.outputs


def test_stages_by_hand_give_what_the_whole_gives() -> None:
    program = by_hand()
    found = cut(program)
    ids = torch.arange(8).view(2, 4) % 11
    weight = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    held = {"first.weight": weight, "scale": torch.tensor(0.5)}
    expected = interpret(program, {"ids": ids}, held)
    assert torch.equal(interpret(found, {"ids": ids}, held)["result"], expected["result"])
    crossing: dict[str, Tensor] = {}
    for stage in range(3):
        alone = stage_program(found, stage)
        crossing = interpret(alone, {name: {"ids": ids, **crossing}[name] for name in alone.inputs}, held)
    assert all(torch.equal(crossing[name], expected[name]) for name in ("result", "hidden"))


def interpret(program: Program, inputs: dict[str, Tensor], held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of a Program written by hand, as one rank that is alone computes them; random draws are all ones."""
    alone = {aten.rand.default: torch.ones, split_allgather: lambda x, *_: x, allgather_split: lambda x, *_: x}
    known = dict(inputs)
    for each in program.units:
        nodes: dict[fx.Node, Any] = {}
        names = {INPUT: iter(each.inputs), PARAMETER: iter(each.parameters), BUFFER: iter(each.buffers)}
        for node in each.body.graph.nodes:
            if node.op == "placeholder":
                name = next(names[node.meta["role"]])
                nodes[node] = known[name] if node.meta["role"] == INPUT else held[name]
            elif node.op == "call_function":
                args = fx.node.map_aggregate(
                    node.args, lambda a, nodes=nodes: number(nodes.get(a, a)) if isinstance(a, (fx.Node, sympy.Expr)) else a
                )
                nodes[node] = alone.get(node.target, node.target)(*args)
        known |= {name: nodes[node] for name, node in zip(each.outputs, each.body.results, strict=True)}
    return {key: known[name] for key, name in program.outputs.items()}


def number(argument: Any) -> Any:
    return int(argument.subs({B: 2, S: 4})) if isinstance(argument, sympy.Expr) else argument


# The stages that were written, run one after the other.

KINDS = {
    "llama": {"num_hidden_layers": 3},
    "gpt2": {"n_layer": 3},
    "gpt_bigcode": {"n_layer": 3},
    "bloom": {"n_layer": 3},
    "gemma2": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stages_one_after_the_other_are_the_model(kind: str, tensor: int) -> None:
    config = tiny_config(kind, **KINDS[kind])
    plans = [lower(config, kind.removesuffix("_text"), tensor, n) for n in (1, 2, 3)]

    def work(rank: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [run_stages(lowered, tensor) for lowered in plans]

    for whole, *others in run_ranks(tensor, work):
        for loss, gradients in others:
            torch.testing.assert_close(loss, whole[0], rtol=1e-12, atol=0)
            assert gradients.keys() == whole[1].keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, whole[1][name], rtol=1e-9, atol=1e-12, msg=name)
    for lowered in plans[1:]:
        # Only the residual stream is sent: tables, positions and masks are computed again.
        assert all(len(lowered.program.sent(i)) == 1 for i in range(lowered.program.stages - 1))


def run_stages(lowered: Lowered, tensor: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and this rank's gradients of all stages, run by one rank of tensor parallelism, with values and gradients handed
    on at the borders."""
    blueprint = lowered.blueprint()
    flat = Mesh(tp=tensor, copies=blueprint.mesh.copies)
    mesh, device = world.start(flat)
    axes = world.axes_of(mesh, flat.engine_mesh(mesh, factored=True))
    coordinates = {name: axis.rank for name, axis in axes.items()}
    tree = held(blueprint, coordinates)
    units = iter(blueprint.units)
    ids = torch.arange(32).view(2, 16) % 97
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(30)}
    streams = Streams(0, flat, coordinates, device)
    made: list[tuple[Any, list[Tensor], Any]] = []
    crossing: tuple[Tensor, ...] = ()
    for index in range(len(blueprint.sources)):
        code = blueprint.module(index).Model
        homes = [home(next(units), tree) for _ in code.unit_classes]
        stage = code(homes, axes, device, streams)
        received = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in crossing]
        if len(blueprint.sources) > 1:
            assert stage.received(2, 16) == borders(received)
        names = [name for name in stage_program(lowered.program, index).inputs if name in batch]
        given = stage.forward(*received, **{name: batch[name] for name in names})
        if len(blueprint.sources) > 1 and index + 1 < len(blueprint.sources):
            assert stage.sent(2, 16) == borders(given)
        made.append((stage, received, given))
        crossing = given if isinstance(given, tuple) else ()
        assert int(stage.tokens(ids)) == 30
    loss = made[-1][2]["loss"]
    gradients: list[Tensor | None] = [None]
    for _, received, given in reversed(made):
        results = list(given) if isinstance(given, tuple) else [given["loss"]]
        pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if result.requires_grad]
        torch.autograd.backward([result for result, _ in pairs], [gradient for _, gradient in pairs])
        gradients = [tensor.grad for tensor in received]
    return loss.detach(), {name: p.grad for name, p in tree.named_parameters() if p.grad is not None}


def borders(tensors: Any) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for tensor in tensors]


def held(blueprint: Blueprint, coordinates: dict[str, int]) -> nn.Module:
    """This rank's pieces of all parameters, the same numbers for every plan."""
    tree = nn.Module()
    for name, plan in blueprint.parameters.items():
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(plan.shape, generator=draw, dtype=torch.float64) * 0.3
        at(tree, name).register_parameter(
            name.rpartition(".")[2], nn.Parameter(whole[local_index(plan, blueprint.mesh, coordinates)])
        )
    for name, buffer in blueprint.buffers.items():
        at(tree, name).register_buffer(name.rpartition(".")[2], buffer)
    return tree


def at(tree: nn.Module, name: str) -> nn.Module:
    for part in name.split(".")[:-1]:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    return tree


def home(plan: Any, tree: nn.Module) -> UnitParameters:
    names = {**plan.parameters, **plan.buffers}
    return UnitParameters({short: (at(tree, name), name.rpartition(".")[2]) for short, name in names.items()}, [])


BEFORE = """
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

    def tokens(self, labels):
        b = labels.size(0)
        s = labels.size(1)
        reshape_1: i64[b*s] = labels.reshape(b*s)
        ne_1: bool[b*s] = reshape_1.ne(-100)
        sum_1: i64[()] = ne_1.sum()
        return sum_1
"""

EXPECTED = """
class Model(Stage):
    unit_classes = (
        # stage 0
        ("embed", First),
        ("layers.0", Layer),
        # stage 1
        ("layers.1", Layer),
        ("head", Last),
    )

    def forward(self, input_ids, labels, num_items_in_batch):
        hidden = self.units[0](input_ids)
        hidden_1 = self.units[1](hidden)
        hidden_2 = self.units[2](hidden_1)
        loss = self.units[3](hidden_2, labels, num_items_in_batch)
        return {"loss": loss}

    def tokens(self, labels):
        b = labels.size(0)
        s = labels.size(1)
        reshape_1: i64[b*s] = labels.reshape(b*s)
        ne_1: bool[b*s] = reshape_1.ne(-100)
        sum_1: i64[()] = ne_1.sum()
        return sum_1
"""


@pinned_torch
def test_two_layers_become_two_stages() -> None:
    lowered = lower_gated_model(pipeline=2)
    assert before_and_after(lowered, "pipeline", "Model") == (BEFORE, EXPECTED)
