"""Capturing a model: what the Program says of it, that it computes what the model does, and that the model is not touched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM, masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface

import shardcomp
from shardcomp import capture as capturing
from shardcomp import presets
from shardcomp.capture import capture, self_check
from shardcomp.capture.masks import Mask, MaskToken, UnclearMask, classify
from shardcomp.capture.vmap import broadcast
from shardcomp.errors import CaptureError
from shardcomp.ir.nodes import value
from shardcomp.ir.program import B, Program, S, Signature, Value
from shardcomp.kernels.attention import _seen, attention
from support.families import tiny_config
from support.models import tiny

pytestmark = pytest.mark.captures_anew

PACKS = hasattr(masking_utils, "find_packed_sequence_indices")
"""Whether this transformers takes positions that restart for packed sequences."""
TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss", "logits"))


def signature(*names: str, training: bool = True) -> Signature:
    return Signature(tuple((name, 2) for name in names), ("loss", "logits") if "labels" in names else ("logits",), training)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny(**changes))


def attentions(program: Program) -> list[Any]:
    return [node for node in program.units[0].body.calls() if node.target is attention]


CALLS = [
    ("input_ids",),
    ("input_ids", "labels"),
    ("input_ids", "labels", "attention_mask"),
    ("input_ids", "labels", "position_ids"),
    ("input_ids", "labels", "attention_mask", "position_ids"),
]


@pytest.mark.parametrize("names", CALLS, ids="-".join)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-14), ("fp32", 1e-6), ("bf16", 1e-2)])
def test_the_program_computes_what_the_model_does(names: tuple[str, ...], precision: str, tolerance: float) -> None:
    model = llama()
    program = capture(model, signature(*names), precision=precision)
    assert not program.degraded and program.static_shape is None
    assert self_check(program, model) <= tolerance


@pytest.mark.parametrize(
    "spoil", [{"causal": False}, {"scale": 0.3}, {"window": 4}, {"softcap": 1.0}], ids=lambda held: next(iter(held))
)
def test_the_self_check_sees_a_wrong_attention(spoil: dict[str, Any]) -> None:
    model = llama()
    program = capture(model, TRAINING, precision="fp32")
    spoiled = attentions(program)[1]
    spoiled.kwargs = {**spoiled.kwargs, **spoil}
    assert self_check(program, model) > 1e-3


def test_a_program_has_one_unit_whose_values_are_known() -> None:
    program = capture(llama(), TRAINING, precision="bf16")
    [unit] = program.units
    assert (unit.path, unit.kind, unit.inputs, unit.outputs) == ("", "model", ("input_ids", "labels"), ("loss", "logits"))
    assert program.inputs == {name: Value((B, S), torch.int64) for name in unit.inputs}
    assert program.outputs == {"loss": "loss", "logits": "logits"}
    assert program.values["logits"] == Value((B, S, 97), torch.bfloat16, requires_grad=True)
    assert program.values["loss"] == Value((), torch.float32, requires_grad=True)
    assert program.output_type is CausalLMOutputWithPast
    unit.body.graph.lint()
    for node in unit.body.calls():
        assert {symbol for v in [node.meta["value"]] for size in v.shape for symbol in getattr(size, "free_symbols", ())} <= {
            B,
            S,
        }


def test_nodes_know_their_module_and_their_line() -> None:
    program = capture(llama(), TRAINING, precision="fp32")
    linear = [node for node in program.units[0].body.calls() if node.target is torch.ops.aten.linear.default]
    paths = [node.meta["path"] for node in linear]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert paths == [f"model.layers.{i}.{part}" for i in range(2) for part in parts] + ["lm_head"]
    assert {node.meta["path"] for node in attentions(program)} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(node.meta["source"].split(":")[0] == "modeling_llama.py" for node in attentions(program))


def test_heads_are_not_repeated_and_no_mask_is_as_large_as_the_scores() -> None:
    for names in CALLS:
        for node in attentions(capture(llama(), signature(*names), precision="fp32")):
            q, k, v = (value(argument).shape for argument in node.args)
            assert q == (B, 4, S, 8) and k == v == (B, 2, S, 8)
            masks = {key: value(held).shape for key, held in node.kwargs.items() if hasattr(held, "meta")}
            assert set(masks.values()) <= {(B, S)}
            assert ("key_mask" in masks) == ("attention_mask" in names)
            assert ("q_segment" in masks) == (PACKS and "attention_mask" not in names)


def test_a_capture_is_in_the_compute_dtype_with_upcasts_and_float32_buffers() -> None:
    program = capture(llama(), TRAINING, precision="bf16")
    assert {p.dtype for p in program.parameters.values()} == {torch.bfloat16}
    assert program.buffers["model.rotary_emb.inv_freq"].value.dtype == torch.float32
    norms = [value(node).dtype for node in program.units[0].body.calls() if node.meta["path"] == "model.norm"]
    assert norms[0] == torch.float32 and norms[-1] == torch.bfloat16


def test_a_float64_capture_holds_no_narrower_number() -> None:
    for names in CALLS:
        program = capture(llama(), signature(*names), precision="fp64")
        held = [value(node).dtype for node in program.units[0].body.graph.nodes if node.op != "output"]
        assert {dtype for dtype in held if dtype.is_floating_point} == {torch.float64}


def test_a_tied_weight_is_one_parameter() -> None:
    model = llama(tie_word_embeddings=True)
    program = capture(model, TRAINING, precision="fp32")
    assert list(program.parameters) == [name for name, _ in model.named_parameters()]
    assert program.parameters["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    [tied] = [
        node for node in program.units[0].body.placeholders("parameter") if node.meta["path"] == "model.embed_tokens.weight"
    ]
    assert {user.target for user in tied.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}
    assert "lm_head.weight" not in program.units[0].parameters


def test_a_frozen_parameter_takes_no_gradient() -> None:
    model = llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    program = capture(model, TRAINING, precision="fp32")
    assert [name for name, p in program.parameters.items() if p.requires_grad] == ["lm_head.weight"]
    nodes = list(program.units[0].body.calls())
    first = next(i for i, node in enumerate(nodes) if node.meta["path"] == "lm_head")
    assert not any(value(node).requires_grad for node in nodes[:first]) and value(nodes[first]).requires_grad


def test_a_model_on_meta_gives_the_program_of_a_real_one() -> None:
    real, meta = llama(), presets.build(tiny())
    assert all(p.is_meta for p in meta.parameters())
    stripped = copy.deepcopy(meta).to("meta")
    programs = [capture(model, TRAINING, precision="bf16") for model in (real, meta, stripped)]
    texts = [str(program.units[0].body.graph) for program in programs]
    assert texts[0] == texts[1] == texts[2]
    for program in programs[1:]:
        assert program.buffers.keys() == programs[0].buffers.keys()
        for name, held in program.buffers.items():
            assert torch.equal(held.value, programs[0].buffers[name].value)
            assert held.persistent == programs[0].buffers[name].persistent


def test_evaluation_mode_is_a_capture_of_its_own() -> None:
    model = llama(attention_dropout=0.1).train()
    assert {n.kwargs["dropout"] for n in attentions(capture(model, TRAINING, precision="fp32"))} == {0.1}
    inference = capture(model, signature("input_ids", training=False), precision="fp32")
    assert all("dropout" not in node.kwargs for node in attentions(inference))


def state(model: nn.Module) -> dict[str, Any]:
    registries = (AttentionInterface, AttentionMaskInterface)
    return {
        "tensors": {
            name: (id(t), t._version, t.dtype, t.device, t.grad) for name, t in model.state_dict(keep_vars=True).items()
        },
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "registries": [dict(registry._global_mapping) for registry in registries],
        "random": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
    }


class Unexportable(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        if input_ids.sum() > 3:
            return super().forward(input_ids=input_ids, labels=labels)
        return None


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Unexportable])
def test_the_model_and_transformers_are_left_as_they_were(kind: type) -> None:
    torch.manual_seed(0)
    model = kind(tiny()).eval()
    model.gradient_checkpointing_enable()
    before = state(model)
    for precision in ("bf16", "fp64"):
        try:
            capture(model, TRAINING, precision=precision)
        except CaptureError:
            assert kind is Unexportable
        else:
            assert kind is LlamaForCausalLM
        assert state(model) == before


@pytest.mark.long  # golden listings show alike layers
def test_another_layer_adds_as_many_nodes_as_the_last_one() -> None:
    counts = []
    for layers in (1, 2, 3, 6):
        model = presets.build(tiny(num_hidden_layers=layers))
        counts.append(len(list(capture(model, TRAINING, precision="bf16").units[0].body.graph.nodes)))
    one = counts[1] - counts[0]
    assert counts == [counts[0] + one * extra for extra in (0, 1, 2, 5)]


def test_a_sliding_window_is_a_number() -> None:
    config = MistralConfig(**{**tiny().to_diff_dict(), "model_type": "mistral", "sliding_window": 5})
    program = capture(MistralForCausalLM(config), TRAINING, precision="fp64")
    assert [node.kwargs["window"] for node in attentions(program)] == [5, 5]


def test_a_model_that_computes_with_its_mask_keeps_its_own_attention() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
    model = BloomForCausalLM(config)
    program = capture(model, TRAINING, precision="fp64")
    assert not attentions(program)
    [degraded] = program.degraded
    assert degraded.what == "attention" and "own attention" in degraded.why
    assert self_check(program, model) <= 1e-12


class DenseMask(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        length = input_ids.shape[1]
        mask = torch.ones((length, length), dtype=torch.bool).tril().expand(input_ids.shape[0], 1, -1, -1)
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=mask, use_cache=False)


def test_a_mask_that_the_model_makes_itself_becomes_a_bias() -> None:
    torch.manual_seed(0)
    model = DenseMask(tiny())
    program = capture(model, TRAINING, precision="fp64")
    assert [(value(node.kwargs["bias"]).shape, node.kwargs["causal"]) for node in attentions(program)] == [
        ((B, 1, S, S), False)
    ] * 2
    assert [degraded.what for degraded in program.degraded] == ["attention"]
    assert self_check(program, model) <= 1e-14


class MaskByIndices(LlamaForCausalLM):
    """Makes its mask as transformers does where a model says more of it than its class: a function of four indices, mapped."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        rows, length = input_ids.shape
        known = input_ids.new_ones((rows, length), dtype=torch.bool)

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & torch.tensor(True) & known[row, key]

        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            seen = torch.vmap(seen, in_dims=dims)
        with TransformGetItemToIndex():
            mask = seen(torch.arange(rows), torch.arange(1), torch.arange(length), torch.arange(length))
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_a_mask_that_is_mapped_over_its_indices_is_the_operators_that_this_runs(precision: str) -> None:
    torch.manual_seed(0)
    model = MaskByIndices(tiny())
    program = capture(model, TRAINING, precision=precision)
    assert all(hasattr(node.target, "_schema") or node.target is attention for node in program.units[0].body.calls())
    assert program.static_shape is None and len(attentions(program)) == 2
    assert self_check(program, model) <= (1e-2 if precision == "bf16" else 1e-14)


MAPPED: dict[str, tuple[tuple[Any, ...], ...]] = {
    "all": ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)),
    "two at once": ((None, None, None, 0), (None, None, 0, None), (0, 0, None, None)),
    "in another order": ((0, None, None, None), (None, None, None, 0), (None, 0, 0, None)),
}
TABLE = torch.arange(12.0).reshape(3, 4)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "all four": lambda a, b, c, d: TABLE[a, d] + 2 * b - c,
    "one": lambda a, b, c, d: c * 3,
    "none": lambda a, b, c, d: torch.tensor(7),
}


@pytest.mark.parametrize("dims", MAPPED)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_of_numbers_is_mapped_by_broadcasting_as_torch_maps_it(function: str, dims: str) -> None:
    def mapped() -> Tensor:
        call = FUNCTIONS[function]
        for each in MAPPED[dims]:
            call = torch.vmap(call, in_dims=each)
        sizes = (3, 3, 3, 4) if dims != "all" else (3, 2, 5, 4)
        return call(*(torch.arange(size) for size in sizes))

    expected = mapped()
    with broadcast():
        got = mapped()
    assert torch.equal(got, expected)


def test_any_other_function_is_mapped_by_torch() -> None:
    with broadcast():
        assert torch.equal(torch.vmap(torch.sum)(torch.ones(2, 3)), torch.tensor([3.0, 3.0]))
        assert torch.equal(torch.vmap(torch.dot, in_dims=(0, None))(torch.ones(2, 3), torch.ones(3)), torch.tensor([3.0, 3.0]))


class FixedLength(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        length = sum(1 for _ in input_ids[0])
        assert length == input_ids.shape[1]
        return super().forward(input_ids=input_ids, labels=labels, **given)


def test_a_graph_that_holds_for_one_shape_says_so() -> None:
    torch.manual_seed(0)
    program = capture(FixedLength(tiny()), TRAINING, precision="fp32", sample=(2, 6))
    assert program.static_shape == (2, 6)
    [degraded] = program.degraded
    assert degraded.what == "shape" and "(2, 6)" in degraded.why
    assert program.inputs["input_ids"].shape == (2, 6)
    assert {value(node).shape for node in attentions(program)} == {(2, 4, 6, 8)}


class Constants(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scales = torch.linspace(0.5, 2.0, 97)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        out = super().forward(input_ids=input_ids, use_cache=False)
        logits = out.logits * self.scales
        logits.add_(torch.tensor([1.0, 2.0])[1]).mul_(3.0)
        out.logits = logits - 1.0
        return out


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_tensors_outside_of_buffers_become_buffers_and_writes_in_place_become_values(precision: str) -> None:
    torch.manual_seed(0)
    model = Constants(tiny())
    program = capture(model, signature("input_ids"), precision=precision)
    assert self_check(program, model) <= (1e-6 if precision == "fp32" else 1e-14)
    extra = [held for name, held in program.buffers.items() if "rotary" not in name]
    assert any(torch.equal(held.value.float(), model.scales) for held in extra)
    assert not any(held.persistent for held in extra)
    assert not any(node.target._schema.is_mutable for node in program.units[0].body.calls() if hasattr(node.target, "_schema"))


class Written(nn.Module):
    """A model without attention that writes into its hidden states."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.change = change

    def forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.change(self.embed(input_ids) * 2))


def row(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def columns(x: Tensor) -> Tensor:
    x[..., 2:6:2] += 1
    return x


def whole_slice(x: Tensor) -> Tensor:
    x[:, :, : x.shape[2]] = x[:, :, : x.shape[2]].masked_fill(x > 0, -1.0)
    return x


def another_view(x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    x[:, 1] = 3
    return x + y.transpose(1, 2)


def through_views(x: Tensor) -> Tensor:
    y = x.view(x.shape[0], x.shape[1], 2, 4).permute(2, 0, 1, 3).unsqueeze(1)
    y[1, 0].mul_(-1)
    return x


def before_and_after(x: Tensor) -> Tensor:
    before = x[:, :1] * 1
    x[:, :1].fill_(7.0)
    return x * before + x[:, :1]


def a_copy_keeps_its_values(x: Tensor) -> Tensor:
    y = x.clone()
    x.zero_()
    return x + y


def twice(x: Tensor) -> Tensor:
    half = x[..., :4]
    half.add_(1)
    half[:, 0].copy_(half[:, 1])
    return x


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = torch.zeros(x.shape[1], 8)
        shift[:, 4:] = 2.5
    shift[0] = 1
    return x + shift


def into_one_of_several(x: Tensor) -> Tensor:
    largest, _ = x.topk(2)
    largest /= largest.sum(-1, keepdim=True)
    return x * largest[..., :1]


WRITES = [row, columns, whole_slice, another_view, through_views, before_and_after, a_copy_keeps_its_values, twice]
WRITES += [under_no_grad, into_one_of_several]


@pytest.mark.parametrize("change", WRITES, ids=lambda change: change.__name__)
def test_writes_through_views_become_values(change: Callable[[Tensor], Tensor]) -> None:
    model = Written(change)
    program = capture(model, signature("input_ids"), precision="fp64")
    assert program.static_shape is None and self_check(program, model) == 0
    assert not any(node.target._schema.is_mutable for node in program.units[0].body.calls() if hasattr(node.target, "_schema"))


@pytest.mark.parametrize("names", [("input_ids", "labels"), ("input_ids", "labels", "attention_mask")], ids="-".join)
@pytest.mark.long  # a float64 capture is looked through for narrower numbers
def test_a_float64_capture_makes_no_narrower_number_either(names: tuple[str, ...]) -> None:
    for kind in ("bloom", "opt", "falcon_rw"):
        program = capture(presets.build(tiny_config(kind)), signature(*names), precision="fp64")
        held = {value(node).dtype for node in program.units[0].body.graph.nodes if node.op != "output"}
        assert {dtype for dtype in held if dtype.is_floating_point} == {torch.float64}


def test_an_input_that_only_the_keyword_arguments_take_has_free_sizes() -> None:
    names = ("input_ids", "labels", "position_ids")
    assert capture(presets.build(tiny_config("bloom")), signature(*names), precision="fp32").static_shape is None


class DropsNoLayer(LlamaForCausalLM):
    chance = 0.0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, use_cache=False)
        if torch.rand([]) < self.chance:
            out.logits = out.logits * 0
        return out


def test_layers_that_are_dropped_with_probability_zero_are_all_there() -> None:
    model = DropsNoLayer(tiny())
    program = capture(model, TRAINING, precision="fp32")
    assert not any("rand" in str(node.target) for node in program.units[0].body.calls())
    model.chance = 0.5
    with pytest.raises(CaptureError, match=r"if torch.rand\(\[\]\) < self.chance"):
        capture(model, TRAINING, precision="fp32")


class CausalByLength(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        out = super().forward(input_ids=input_ids, use_cache=False)
        x = out.logits.unsqueeze(1)
        out.logits = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=input_ids.shape[1] > 1).squeeze(1)
        return out


def test_attention_that_is_causal_for_more_than_one_token_has_free_sizes() -> None:
    model = CausalByLength(tiny())
    program = capture(model, signature("input_ids"), precision="fp64")
    assert program.static_shape is None and self_check(program, model) <= 1e-14


# Masks: every function of HuggingFace's that is known must mean what the function itself computes.

LENGTH = 12
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]])
SEQUENCES = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
PADDING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)


def known() -> dict[str, Callable[..., Any]]:
    m = masking_utils
    causal, window = m.causal_mask_function, m.sliding_window_causal_mask_function(4)
    functions = {
        "causal": causal,
        "window": window,
        "two windows": m.and_masks(window, m.sliding_window_causal_mask_function(3)),
        "padding": m.and_masks(causal, m.padding_mask_function(PADDING)),
    }
    if hasattr(m, "packed_sequence_mask_function"):
        packed = m.packed_sequence_mask_function(SEQUENCES)
        functions["packed"] = m.and_masks(causal, packed)
        functions["padded and packed"] = m.and_masks(window, packed, m.padding_mask_function(PADDING))
    if hasattr(m, "remap_positions_for_packed_sequence"):
        remap = m.remap_positions_for_packed_sequence
        functions["packed, positions restart"] = m.and_masks(packed, remap(causal, POSITIONS))
        functions["packed window"] = m.and_masks(packed, remap(window, POSITIONS))
        functions["a part, then packed"] = m.and_masks(m.and_masks(remap(causal, POSITIONS), window), packed)
        functions["bidirectional"] = m.bidirectional_mask_function
        functions["chunked"] = m.chunked_causal_mask_function(5, torch.tensor([0, 0]))
        functions["chunked after padding"] = m.chunked_causal_mask_function(5, torch.tensor([3, 0]))
    return functions


def by_function(function: Callable[..., Any]) -> Tensor:
    seen = torch.zeros((2, LENGTH, LENGTH), dtype=torch.bool)
    for b, i, j in itertools.product(range(2), range(LENGTH), range(LENGTH)):
        seen[b, i, j] = bool(function(torch.tensor(b), torch.tensor(0), torch.tensor(i), torch.tensor(j)))
    return seen


@pytest.mark.parametrize("name", known())
def test_a_mask_means_what_its_function_computes(name: str) -> None:
    function = known()[name]
    mask = classify(function, 2, LENGTH, None)
    empty = torch.empty((2, 1, LENGTH, 0))
    segments = (mask.segment, mask.segment)
    got = _seen(empty, empty, (None, None), segments, mask.key_mask, mask.causal, mask.window)
    assert torch.equal(got.expand(2, 1, -1, -1)[:, 0], by_function(function))


def test_the_padding_of_the_caller_joins_the_mask() -> None:
    mask = classify(masking_utils.causal_mask_function, 2, LENGTH, PADDING.long())
    assert mask.key_mask is not None and torch.equal(mask.key_mask, PADDING)


UNCLEAR: dict[str, Callable[..., Any]] = {
    "somebody's own": lambda b, h, q, k: k <= q,
    "a union": masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.padding_mask_function(PADDING)),
    "a window that is not causal": masking_utils.sliding_window_overlay(4),
    "an offset": masking_utils.add_offsets_to_mask_function(masking_utils.causal_mask_function, 3, 0),
    "a part that is not known": masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: q > 1),
}
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
    remap = masking_utils.remap_positions_for_packed_sequence
    UNCLEAR["restarts alone"] = remap(masking_utils.causal_mask_function, POSITIONS)
    chunks = masking_utils.chunked_causal_mask_function(5, torch.tensor([0, 0]))
    packed = masking_utils.packed_sequence_mask_function(SEQUENCES)
    UNCLEAR["packed chunks"] = masking_utils.and_masks(packed, remap(chunks, POSITIONS))


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_mask_that_is_not_known_is_never_guessed(name: str) -> None:
    with pytest.raises(UnclearMask):
        classify(UNCLEAR[name], 2, LENGTH, None)


@pytest.mark.captures_anew
def test_a_call_is_exported_once_whichever_of_its_results_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = []
    true = capturing.export
    monkeypatch.setattr(capturing, "export", lambda *given: exported.append(given) or true(*given))
    lowered = shardcomp.lower(tiny(), shardcomp.Policy.load("llama", tensor=2), seq=16)
    call = lowered.program.signature
    lowered.for_call((call.inputs, ("loss", "logits"), call.training), (2, 24))
    assert len(exported) == 1 and lowered.program.signature.outputs == ("loss",)


USES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda token: token.shape,
    "dim": lambda token: token.dim(),
    "to": lambda token: token.to(torch.bool),
    "index": lambda token: token[:, :, :, :4],
    "truth": lambda token: 1 if token else 0,
    "comparison": lambda token: token == 0,
    "sum": lambda token: torch.ones(2) + token,
    "product": lambda token: token * 2,
    "where": lambda token: torch.where(token, 1.0, 0.0),
    "sdpa": lambda token: nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3, attn_mask=token),
}


@pytest.mark.parametrize("name", USES)
def test_a_mask_token_cannot_be_computed_with(name: str) -> None:
    with pytest.raises(TypeError):
        USES[name](MaskToken(Mask(), lambda what: None))


def test_a_mask_token_may_be_handed_on() -> None:
    token = MaskToken(Mask(), lambda what: pytest.fail(what))
    assert token is not None and isinstance({"full": token}, dict) and hash(token) and not isinstance(token, Tensor)
