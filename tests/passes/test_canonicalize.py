"""The canonical graph: its one form, and that it computes what the model computes, gradients included."""

from __future__ import annotations

import copy
import operator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    masking_utils,
)

from shardcomp import Policy
from shardcomp.capture import capture, self_check
from shardcomp.ir.interpreter import evaluate
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.nodes import value
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import B, Context, Program, S, Signature, Value
from shardcomp.ir.well_formed import check_program
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.passes import canonicalize
from support.listings import before_and_after, lower_gated_model, pinned_torch
from support.models import tiny

pytestmark = pytest.mark.captures_anew

PACKS = hasattr(masking_utils, "find_packed_sequence_indices")
"""Whether this transformers takes positions that restart for packed sequences."""
aten = torch.ops.aten
CONTEXT = Context(Mesh(), Policy.load("llama"))


def canonical(model: nn.Module, *names: str, precision: str = "fp64", outputs: tuple[str, ...] = ("loss", "logits")) -> Program:
    program = capture(model, Signature(tuple((name, 2) for name in names), outputs), precision=precision)
    return canonicalize.run(program, CONTEXT)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny(**changes)).double()
    # Weights that make attention anything but uniform.
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 2 * p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model


def batch(*names: str, rows: int = 3, length: int = 10) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (rows, length), generator=draw)
    labels = torch.where(torch.rand((rows, length), generator=draw) < 0.3, -100, ids)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -3:] = 0, 0
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7], list(range(10))])[:rows, :length]
    if "attention_mask" in names:
        labels = torch.where(mask == 0, -100, labels)
    made = {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}
    return {name: made[name] for name in names}


def gradients(model: nn.Module, given: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    reference = copy.deepcopy(model)
    for module in reference.modules():
        for name, held in module.named_buffers(recurse=False):
            if held.is_floating_point():
                module._buffers[name] = held.float().double()
    with Widened():
        out = reference(**given, use_cache=False)
        out.loss.backward()
    return out, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}


def run(program: Program, model: nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    count = (given["labels"][:, 1:] != -100).sum()
    out = evaluate(program, {**given, "num_items_in_batch": count}, weights)
    out["loss"].backward()
    return out, {name: w.grad for name, w in weights.items() if w.grad is not None}


def assert_equal(model: nn.Module, names: tuple[str, ...]) -> None:
    given = batch(*names)
    expected, wanted = gradients(model, given)
    got, found = run(canonical(model, *names), model, given)
    # A query that sees no key may hold any number; its label never counts.
    seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    torch.testing.assert_close(got["loss"], expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got["logits"][seen], expected.logits[seen], rtol=1e-12, atol=1e-12)
    assert found.keys() == wanted.keys()
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-12 * max(gradient.norm(), 1e-6 * total), name


CALLS = [
    ("input_ids", "labels"),
    ("input_ids", "labels", "attention_mask"),
    ("input_ids", "labels", "position_ids"),
    ("input_ids", "labels", "attention_mask", "position_ids"),
]


@pytest.mark.parametrize("names", CALLS, ids="-".join)
def test_loss_logits_and_gradients_are_the_models(names: tuple[str, ...]) -> None:
    assert_equal(llama(), names)


def test_gradients_of_tied_and_frozen_weights_are_the_models() -> None:
    model = llama(tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    assert_equal(model, CALLS[0])


OTHERS = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0}),
}


@pytest.mark.parametrize("names", CALLS[:3], ids="-".join)
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_lose_nothing_either(family: str, names: tuple[str, ...]) -> None:
    kind, config, changes = OTHERS[family]
    settings = {key: held for key, held in tiny().to_diff_dict().items() if key not in ("model_type", "architectures", "dtype")}
    torch.manual_seed(0)
    model = kind(config(**{**settings, **changes}))
    model.config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    model = model.double()
    assert_equal(model, names)


def test_a_model_whose_layers_hold_their_weights_transposed_is_the_same() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    assert_equal(GPT2LMHeadModel(config).double(), CALLS[0])


# The form.

PROGRAMS: dict[tuple[Any, ...], Program] = {}


def held(names: tuple[str, ...], precision: str) -> Program:
    if (names, precision) not in PROGRAMS:
        PROGRAMS[names, precision] = canonical(llama(), *names, precision=precision)
    return PROGRAMS[names, precision]


@pytest.fixture(params=list(zip(CALLS, ["fp64", "bf16", "fp32", "bf16"], strict=True)), ids=lambda p: "-".join((*p[0], p[1])))
def program(request: pytest.FixtureRequest) -> Program:
    return held(*request.param)


def test_calls_are_aten_operators_items_attention_and_cross_entropy(program: Program) -> None:
    for node in program.units[0].body.calls():
        assert isinstance(node.target, torch._ops.OpOverload) or node.target in (operator.getitem, attention, cross_entropy)
        assert not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "aten"


def test_sizes_are_numbers_or_expressions_in_b_and_s(program: Program) -> None:
    for node in program.units[0].body.calls():
        for leaf in torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs))):
            if isinstance(leaf, sympy.Basic):
                assert leaf.free_symbols <= {B, S}
            else:
                assert leaf is None or isinstance(leaf, (fx.Node, int, float, str, torch.dtype)), (node, leaf)


def test_shapes_change_by_reshape_and_expand_with_every_size(program: Program) -> None:
    for node in program.units[0].body.calls():
        name = str(node.target)
        assert not any(
            word in name for word in ("view", "flatten", "squeeze.dim", "_to_copy", "type_as", "contiguous", "clone")
        )
        if node.target in (aten.reshape.default, aten.expand.default):
            assert tuple(node.args[1]) == value(node).shape != value(node.args[0]).shape
        if "aten.to." in name:
            assert node.target is aten.to.dtype and not node.kwargs and node.args[1] == value(node).dtype
            assert value(node.args[0]).dtype != value(node).dtype


def test_nothing_is_left_that_does_nothing(program: Program) -> None:
    for node in program.units[0].body.calls():
        assert node.users and not {"device", "layout", "pin_memory", "memory_format"} & node.kwargs.keys()
        assert node.target not in (aten.detach.default, aten.alias.default, aten.dropout.default, aten.lift_fresh_copy.default)
        if node.target is aten.slice.Tensor:
            assert value(node).shape != value(node.args[0]).shape
    assert set(program.buffers) == {"model.rotary_emb.inv_freq"} == set(program.units[0].buffers)


def test_what_is_known_of_each_value_is_what_it_is(program: Program) -> None:
    model, given = llama(), batch(*(name for name, _ in program.signature.inputs))
    given["num_items_in_batch"] = torch.tensor(7)
    parameters = {
        p.name: model.get_parameter(p.name).detach().to(p.dtype).requires_grad_() for p in program.parameters.values()
    }
    [unit] = program.units
    every = replace(unit, body=replace(unit.body, graph=_with_every_result(unit.body.graph)))
    names = {str(i): str(i) for i in range(len(every.body.results))}
    results = evaluate(replace(program, units=[every], outputs=names), given, parameters)
    sizes = dict(zip((B, S), given["input_ids"].shape, strict=True))
    for node, result in zip(every.body.results, results.values(), strict=True):
        known = value(node)
        assert tuple(int(sympy.sympify(size).subs(sizes)) for size in known.shape) == tuple(result.shape), node
        assert (known.dtype, known.requires_grad) == (result.dtype, result.requires_grad), node


def _with_every_result(graph: fx.Graph) -> fx.Graph:
    every = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            copies[node] = every.node_copy(node, lambda n: copies[n])
            copies[node].meta = dict(node.meta)
    every.output(tuple(copy for node, copy in copies.items() if node.op == "call_function"))
    return every


def test_the_driver_finds_no_fault(program: Program) -> None:
    check_program(program, {"canonical"}, "canonicalize")
    assert tuple(program.inputs) == program.units[0].inputs == (*(n for n, _ in program.signature.inputs), "num_items_in_batch")


def test_positions_that_the_model_counted_itself_are_not_packed() -> None:
    for names, given in (
        (CALLS[0], set()),
        (CALLS[1], {"key_mask"}),
        (CALLS[2], {"q_segment", "k_segment"} if PACKS else set()),
        (CALLS[3], {"key_mask"}),
    ):
        nodes = [node for node in held(names, "fp64").units[0].body.calls() if node.target is attention]
        assert len(nodes) == 2 and all(node.kwargs.keys() - {"scale"} == given for node in nodes)


def test_the_loss_is_a_sum_divided_by_a_count_that_is_given() -> None:
    program = held(CALLS[0], "bf16")
    [losses] = [node for node in program.units[0].body.calls() if node.target is cross_entropy]
    [total] = losses.users
    [loss] = total.users
    assert (total.target, loss.target, losses.args[2]) == (aten.sum.default, aten.div.Tensor, -100)
    assert loss.args[1].meta["path"] == "num_items_in_batch" and loss is program.units[0].body.results[0]
    assert value(losses) == Value((B * S,), torch.float32, requires_grad=True)
    assert program.inputs["num_items_in_batch"] == Value((), torch.int64)
    assert program.values["loss"].requires_grad


def test_logits_alone_need_no_count() -> None:
    program = canonical(llama(), "input_ids", outputs=("logits",), precision="bf16")
    assert tuple(program.inputs) == ("input_ids",)
    assert self_check(program, llama()) == 0


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_the_canonical_program_passes_the_self_check(precision: str) -> None:
    assert self_check(held(CALLS[2], precision), llama()) <= (1e-2 if precision == "bf16" else 1e-6)


class Cut(LlamaForCausalLM):
    """Half of what feeds the head is computed under no_grad, with copies and casts that do nothing on the way."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        out = self.model(input_ids=input_ids, use_cache=False)
        hidden = out.last_hidden_state
        with torch.no_grad() if given.get("cut", True) else nullcontext():
            half = (hidden.contiguous().clone() * self.model.norm.weight).reshape(hidden.shape)
        logits = self.lm_head(hidden.to(hidden.dtype) + half.detach() + half)
        loss = self.loss_function(logits, labels, vocab_size=97)
        return type("Out", (dict,), {"__getattr__": dict.__getitem__})({"loss": loss, "logits": logits})


def test_no_gradient_leaves_a_region_without_one() -> None:
    torch.manual_seed(0)
    model = Cut(tiny()).double()
    assert_equal(model, CALLS[0])
    program = canonical(model, *CALLS[0])
    cuts = [node for node in program.units[0].body.calls() if node.target is aten.detach.default]
    assert len(cuts) == 2 and not any(value(node).requires_grad for node in cuts)
    assert all(value(node.args[0]).requires_grad for node in cuts)
    assert not any("no_grad" in node.meta for node in program.units[0].body.calls())


def test_the_captured_program_is_not_changed() -> None:
    program = capture(llama(), Signature((("input_ids", 2), ("labels", 2)), ("loss",)), precision="fp32")
    before = str(program.units[0].body.graph), dict(program.inputs), program.units[0]
    canonicalize.run(program, CONTEXT)
    assert (str(program.units[0].body.graph), dict(program.inputs), program.units[0]) == before


BEFORE = """
class Model(Unit):  #
    def forward(self, input_ids, labels):
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
        view_1: f32[b, s, 8] = aten.view(down, [b, s, 8])
        _0: f32[b, s, 8] = embed + view_1
        head: f32[b, s, 23] = linear(_0, w.head.weight)
        flatten_1: f32[b*s, 23] = aten.flatten(head, 0, 1)
        flatten_2: i64[b*s] = aten.flatten(labels)
        cross_entropy_loss_1: f32[()] = aten.cross_entropy_loss(flatten_1, flatten_2)
        return cross_entropy_loss_1
"""

EXPECTED = """
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


@pinned_torch
def test_the_loss_of_a_small_model_is_divided_by_a_count_that_is_given() -> None:
    lowered = lower_gated_model(layers=1)
    assert before_and_after(lowered, "canonicalize", "Model") == (BEFORE, EXPECTED)
