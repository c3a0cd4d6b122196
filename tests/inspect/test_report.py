"""Reports: what they say of a Program written by hand, and that a run holds exactly what they predict."""

from __future__ import annotations

import ast
import collections
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from shardcomp.errors import PlanError
from shardcomp.inspect.diff import diff
from shardcomp.inspect.report import render, report, size_text
from shardcomp.ir.collectives import allgather_reducescatter, reducescatter_allgather
from shardcomp.ir.layout import PARTIAL, Layout, split
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.program import INPUT, PARAMETER, B, Body, Degraded, Parameter, Plan, Program, S, Signature, Unit, Value
from shardcomp.lowering import lower
from shardcomp.materialize import allocate, weights_of
from shardcomp.policy import Policy
from shardcomp.policy.patterns import Entry, parse
from shardcomp.runtime.gradients import local
from shardcomp.runtime.optimizer import AdamW
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny, with_idle

H, F, LAYERS, BATCH, LENGTH = 6, 10, 3, 2, 8


def by_hand(tensor: int = 2, data: int = 2) -> Any:
    """Layers of one gathered product and one scattered one, and a norm weight whose gradient is partial."""
    tp = Layout().put("tp", split(1))
    hidden = Value((B, S, H), torch.bfloat16, True, tp)
    graph = fx.Graph()

    def placeholder(name: str, role: str, value: Value) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = {"role": role, "path": name, "value": value}
        return node

    def call(target: Any, args: tuple[Any, ...], value: Value) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"path": "", "value": value}
        return node

    x = placeholder("x", INPUT, hidden)
    norm = placeholder("norm.weight", PARAMETER, Value((H,), torch.float32, True))
    up = placeholder("up.weight", PARAMETER, Value((F, H), torch.float32, True, Layout().put("tp", split(0))))
    h = call(torch.ops.aten.mul.Tensor, (x, norm), hidden)
    whole = call(allgather_reducescatter, (h, 1, "tp"), Value((B, S, H), torch.bfloat16, True))
    wide = call(
        torch.ops.aten.linear.default, (whole, up), Value((B, S, F), torch.bfloat16, True, Layout().put("tp", split(2)))
    )
    summand = call(torch.ops.aten.neg.default, (wide,), Value((B, S, H), torch.bfloat16, True, Layout().put("tp", PARTIAL)))
    back = call(reducescatter_allgather, (summand, 1, "tp"), hidden)
    graph.output((back,))
    body = Body("Layer", graph)
    units, parameters, values = [], {}, {"h0": hidden}
    for i in range(LAYERS):
        names = (f"layers.{i}.norm.weight", f"layers.{i}.up.weight")
        parameters[names[0]] = Parameter(names[0], (H,), torch.float32, partial_gradient=("tp",))
        parameters[names[1]] = Parameter(names[1], (F, H), torch.float32, layout=Layout().put("tp", split(0)))
        values[f"h{i + 1}"] = hidden
        units.append(Unit(f"layers.{i}", "layer", body, (f"h{i}",), (f"h{i + 1}",), names))
    parameters["layers.0.up.weight"].requires_grad = False
    mesh = Mesh(dp=data, tp=tensor)
    program = Program(
        name="Net",
        signature=Signature((("x", 3),), ("y",)),
        units=units,
        inputs={"h0": hidden},
        outputs={"y": f"h{LAYERS}"},
        values=values,
        parameters=parameters,
        buffers={},
        mesh=mesh,
        degraded=[Degraded("a thing", "a reason")],
    )
    policy = Policy("net", (Entry(parse("layers.*.up"), "colwise"),), (), {"tensor": tensor}, source="policies/llama.toml")
    return SimpleNamespace(
        program=program, mesh=mesh, policy=policy, seq=LENGTH, micro_batch=BATCH, global_batch=BATCH * data * 2
    )


def pipelined(**options: Any) -> Any:
    """Four layers over four stages or two."""
    policy = Policy.load("llama", tensor=2, pipeline=2, **options)
    return lower(tiny(num_hidden_layers=4, vocab_size=96), policy, 8, seq=16, micro_batch=2, global_batch=12)


def sends(found: dict[str, Any]) -> set[tuple[str, str, int, int]]:
    return {(e["where"], e["phase"], e["count"], e["bytes"]) for e in found["collectives"] if e["op"] == "send"}


def test_a_rank_sends_its_residual_stream_on_and_the_gradient_back() -> None:
    lowered = pipelined()
    once = 3 * 2 * 16 // 2 * 32 * 2  # micro-batches · samples · length of a rank · hidden · bf16
    assert sends(lowered.report(0)) == {("stage 0 → 1", "forward", 3, once)}
    assert sends(lowered.report(4)) == {("stage 1 → 0", "backward", 3, once)}
    assert all(entry["axis"] == "pp" for entry in lowered.report(0)["collectives"] if entry["op"] == "send")


def test_two_stages_of_one_rank_send_each_other_nothing() -> None:
    lowered = pipelined(schedule="zbv")
    places = [{where for where, *_ in sends(lowered.report(rank))} for rank in (0, 4)]
    assert places == [{"stage 0 → 1", "stage 3 → 2"}, {"stage 2 → 3", "stage 1 → 0"}]


@pytest.mark.parametrize("options", [{}, {"schedule": "zbv"}, {"schedule": "interleaved"}])
def test_the_stages_of_all_ranks_are_the_model(options: dict[str, Any]) -> None:
    lowered = pipelined(**options)
    whole = lower(
        tiny(num_hidden_layers=4, vocab_size=96), Policy.load("llama", tensor=2), 4, seq=16, micro_batch=2, global_batch=12
    )
    found, one = [lowered.report(rank) for rank in (0, 4)], whole.report()
    for key in ("parameters", "gradients", "optimizer"):
        assert sum(each["memory"][key] for each in found) == one["memory"][key]
    for key in ("model", "hardware"):
        assert sum(each["flops"][key] for each in found) == one["flops"][key]
    assert sum(entry["parameters"] for each in found for entry in each["replicated"]) == sum(
        entry["parameters"] for entry in one["replicated"]
    )
    for each in found:
        assert sum(stage["flops"] for stage in each["stages"]) == each["flops"]["hardware"]
        assert sum(stage["memory"] for stage in each["stages"]) == sum(each["memory"].values())
        assert (4 + 2) * sum(stage["parameters"] for stage in each["stages"]) == each["memory"]["parameters"]
    for key, (count, size) in traffic(one).items():
        if key[1] == "tp" and key[2] != "step":
            assert [sum(traffic(each).get(key, (0, 0))[i] for each in found) for i in (0, 1)] == [count, size]
    paths = [path for each in found for stage in each["stages"] for path in stage["units"] if "rotary" not in path]
    assert sorted(paths) == sorted(unit.path for unit in whole.program.units)


@pytest.mark.long  # cost/test_communication.py sums its gradients
def test_a_tied_weight_is_held_by_both_of_the_ranks_that_use_it() -> None:
    config = tiny(num_hidden_layers=4, vocab_size=96, tie_word_embeddings=True)
    held = [
        sum(lower(config, Policy.load("llama", pipeline=n), seq=16).report(rank)["memory"]["parameters"] for rank in range(n))
        for n in (1, 2)
    ]
    assert held[1] - held[0] == 96 * 32 * (4 + 2)


def test_what_a_unit_computes_again_counts_once_more_for_the_hardware_alone() -> None:
    lowered = pipelined()
    before = lowered.report()["flops"]
    again = Plan(stage=0, recompute="full")
    units = [replace(u, plan=again) if u.path == "model.layers.0" else u for u in lowered.program.units]
    lowered.records[-1] = replace(lowered.records[-1], program=replace(lowered.program, units=units))
    after = lowered.report()["flops"]
    layer = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) * 2 * 16 + 2 * 2 * 4 * 16 * 16 * (8 + 8)
    assert after["model"] == before["model"]
    last = 2 * 32 * 48 * 2 * 16  # the product at the layer's end, which no backward needs
    assert after["hardware"] - before["hardware"] == 3 * (layer - last) // 2


def test_a_rendered_report_shows_the_stages_of_a_pipeline() -> None:
    lowered = pipelined(schedule="zbv")
    text = render(lowered.report())
    assert "model.embed_tokens … model.layers.0" in text and "model.rotary_emb … lm_head" in text
    assert "send" in text and "a rank runs" not in render(report(by_hand()))


def test_a_listing_of_a_pipeline_is_that_of_the_ranks_stages() -> None:
    lowered = pipelined(schedule="zbv")
    assert [lowered.stages_of(rank) for rank in (0, 4)] == [[0, 3], [1, 2]]
    text = lowered.listing(rank=4)
    ast.parse(text)
    assert text.count("class Model(Stage)") == 2 and text.index("# stage 1") < text.index("# stage 2")
    assert lowered.listing(after="tensor", rank=4).count("class Model(Stage)") == 1
    assert list(lowered.program.source) == [f"stage_{i}.py" for i in range(4)]
    assert tuple(lowered.program.source.values()) == lowered.blueprint().sources


def traffic(found: dict[str, Any]) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(op, axis, phase) -> (count, bytes), added up over the units."""
    totals: dict[tuple[str, str, str], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for entry in found["collectives"]:
        key = (entry["op"], entry["axis"], entry["phase"])
        totals[key] = (totals[key][0] + entry["count"], totals[key][1] + entry["bytes"])
    return dict(totals)


def test_model_mesh_and_policy_are_what_was_lowered() -> None:
    found = report(by_hand())
    assert found["model"] == {"name": "Net", "parameters": LAYERS * (H + F * H), "layers": LAYERS}
    assert found["mesh"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    options = found["policy"]["options"]
    assert (options["tensor"], options["data"], options["micro_batch"], options["sequence_parallel"]) == (2, 2, BATCH, True)
    assert found["step"] == {"seq": LENGTH, "micro_batch": BATCH, "global_batch": 8}
    assert found["degraded"] == [{"what": "a thing", "why": "a reason"}]
    why = "no entry of [weights] splits it"
    assert found["replicated"] == [{"what": "layers.*.norm.weight", "weights": LAYERS, "parameters": LAYERS * H, "why": why}]


def test_memory_counts_this_ranks_shards_and_no_gradient_of_frozen_weights() -> None:
    share = H + F // 2 * H
    trained = LAYERS * share - F // 2 * H
    expected = {"parameters": (4 + 2) * LAYERS * share, "gradients": 4 * trained, "optimizer": 8 * trained, "host": 0}
    assert report(by_hand())["memory"] == expected


def test_messages_are_counted_once_per_micro_batch_and_gradients_once_per_step() -> None:
    micro_batches, piece, whole = 2, BATCH * LENGTH // 2 * H * 2, BATCH * LENGTH * H * 2
    times = LAYERS * micro_batches
    found = traffic(report(by_hand()))
    assert found["all_gather", "tp", "forward"] == (times, times * piece)
    assert found["reduce_scatter", "tp", "forward"] == (times, times * whole)
    assert found["reduce_scatter", "tp", "backward"] == (times, times * whole)
    assert found["all_gather", "tp", "backward"] == (times, times * piece)
    assert found["all_reduce", "tp", "step"] == (1, 4 * LAYERS * H)
    assert found["all_reduce", "dp", "backward"] == (LAYERS, 4 * (LAYERS * H + (LAYERS - 1) * F // 2 * H))


def test_an_axis_of_one_rank_sends_nothing() -> None:
    assert {axis for _, axis, _ in traffic(report(by_hand(data=1)))} == {"tp"}
    assert {axis for _, axis, _ in traffic(report(by_hand(tensor=1)))} == {"dp"}


def test_norms_are_one_line_of_the_text_and_other_replicated_weights_one_each() -> None:
    found = report(by_hand())
    assert f"replicated: {LAYERS} norm weights, {LAYERS * H} elements\n" in render(found)
    table = {"what": "model.wpe.weight", "weights": 1, "parameters": 12_000, "why": "no entry of [weights] splits it"}
    ln = {"what": "h.*.ln_1.bias", "weights": 4, "parameters": 40, "why": "no entry of [weights] splits it"}
    text = render({**found, "replicated": [*found["replicated"], table, ln]})
    assert f"replicated: {LAYERS + 4} norm weights, {LAYERS * H + 40} elements\n" in text
    assert "replicated: model.wpe.weight, 12,000 elements: no entry of [weights] splits it\n" in text
    assert text.count("replicated:") == 2


def test_a_report_is_plain_data() -> None:
    found = report(by_hand())
    assert json.loads(json.dumps(found)) == found


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="rank 4: the world has the ranks 0 to 3"):
        report(by_hand(), rank=4)


def test_the_rendered_report_adds_up_what_the_units_send() -> None:
    found = report(by_hand())
    text = render(found)
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in text.splitlines()]
    totals = traffic(found)
    count, size = sum(c for c, _ in totals.values()), sum(s for _, s in totals.values())
    assert ["total", str(count), *size_text(size).split()] in rows
    for (op, axis, phase), (count, size) in totals.items():
        assert [op, axis, phase, str(count), *size_text(size).split()] in rows
    assert "tensor = 2" in text and "degraded  a thing: a reason" in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"), (405_000_000_000, "405 GB")]
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_diff_shows_what_differs_and_nothing_where_nothing_does() -> None:
    assert diff("a\nb\n", "a\nc\n", "before", "after").splitlines()[:2] == ["--- before", "+++ after"]
    assert "-b\n+c\n" in diff("a\nb\n", "a\nc\n", "before", "after")
    assert diff("a\n", "a\n", "before", "after") == ""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"tensor": 2, "data": 2},
        {"tensor": 2, "precision": "fp64"},
        {"data": 3, "zero": 1},
        {"data": 2, "tensor": 2, "zero": 2},
        {"data": 4, "zero": 3, "replicate": 2},
        {"data": 3, "tensor": 2, "zero": 3, "precision": "fp32"},
        {"data": 2, "zero": 0, "offload": "optimizer"},
        {"data": 3, "zero": 2, "offload": "optimizer"},
        {"data": 2, "zero": 3, "offload": "model.layers.1"},
        {"zero": 3, "offload": "all"},
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_a_run_holds_between_micro_batches_what_the_report_says(options: dict[str, Any], tied: bool) -> None:
    holds_what_the_report_says(tiny(vocab_size=67, tie_word_embeddings=tied), **options)


@pytest.mark.parametrize("options", [{"data": 2, "zero": 1}, {"data": 2, "tensor": 2, "zero": 3}], ids=str)
def test_a_run_holds_no_gradient_of_what_no_call_uses(options: dict[str, Any]) -> None:
    holds_what_the_report_says(with_idle(), **options)


def holds_what_the_report_says(model: Any, **options: Any) -> None:
    lowered = lower(model, Policy.load("llama", **options, micro_batch=1), seq=8, micro_batch=1)
    weights = weights_of(lowered)
    ids = torch.arange(16).view(2, 8)

    def work(rank: int) -> dict[str, int]:
        sharded = allocate(lowered, weights)
        optimizer = AdamW(sharded.parameters())
        sharded.train_step(input_ids=ids, labels=ids)
        optimizer.step()
        optimizer.zero_grad()
        [chunk] = sharded._stage_shards
        found: list[dict[str, int]] = []
        chunk.root.register_forward_pre_hook(lambda *_: found.append(held(chunk, optimizer)), prepend=True)
        sharded.train_step(input_ids=ids, labels=ids)
        return found[1]

    found = run_ranks(lowered.mesh.world_size, work)
    assert [lowered.report(rank)["memory"] for rank in range(lowered.mesh.world_size)] == found


def held(chunk: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The bytes that FSDP and an optimizer hold on the device, and on the host; several tensors may be views of one storage."""
    kept: dict[str, list[Any]] = {"parameters": [], "gradients": [], "optimizer": [], "host": []}
    for module in chunk.groups:
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for each in group.fsdp_params:
                moments = [moment for moment in optimizer.state[each.sharded_param].values() if moment.dim()]
                pieces = {
                    "parameters": [each._sharded_param_data],
                    "gradients": [each.sharded_param.grad],
                    "optimizer": moments,
                }
                for name, tensors in pieces.items():
                    kept["host" if each.offload_to_cpu else name] += tensors
                kept["parameters"] += each.all_gather_outputs
                kept["gradients"] += [each.unsharded_accumulated_grad, each.unsharded_param.grad]
    sizes = {}
    for name, tensors in kept.items():
        storages = [local(tensor).untyped_storage() for tensor in tensors if tensor is not None]
        sizes[name] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return sizes
