"""Models that are patched by functions: a capture copies what these hold, or refuses what it cannot copy."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from capture.plans import assert_alike, batch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import shardcomp
from shardcomp import presets
from shardcomp.capture import capture, self_check
from shardcomp.capture.copying import copy_model
from shardcomp.errors import CaptureError
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import Signature
from shardcomp.verification.dense_model import in_dtype, without_dropout
from shardcomp.verification.sharded_model import run_plan
from shardcomp.weights.initialization import initialize
from support.models import tiny

pytestmark = pytest.mark.captures_anew

TRAINING = Signature((("input_ids", 2), ("labels", 2)), ("loss", "logits"))


def closure(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = (lambda old: lambda x: old(x) * 0.5)(layer.mlp.forward)


def wraps(model: Any) -> None:
    def halved(old: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(old)
        def forward(*args: Any, **given: Any) -> Any:
            return old(*args, **given) * 0.5

        return forward

    for layer in model.model.layers:
        layer.mlp.forward = halved(halved(layer.mlp.forward))


def default_argument(model: Any) -> None:
    for layer in model.model.layers:

        def forward(x: Tensor, old: Any = layer.mlp.forward, *, scale: Any = layer.input_layernorm.weight) -> Any:
            return old(x) * scale

        layer.mlp.forward = forward


def containers(model: Any) -> None:
    """The modules are in a list, a dictionary and a tuple that the functions hold."""
    every = {"layers": [(layer.input_layernorm, layer.mlp.forward) for layer in model.model.layers]}

    def forward_of(index: int) -> Callable[[Tensor], Tensor]:
        return lambda x: every["layers"][index][1](x) + every["layers"][index][0].weight.mean()

    for index, layer in enumerate(model.model.layers):
        layer.mlp.forward = forward_of(index)


def method_with_closure(model: Any) -> None:
    def scaled_by(norm: nn.Module) -> Callable[..., Any]:
        return lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x * norm.weight)) * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(scaled_by(layer.input_layernorm), layer.mlp)


def partial(model: Any) -> None:
    def scaled(old: Any, scale: Any, x: Tensor) -> Tensor:
        return old(x) * scale()

    for layer in model.model.layers:
        weight = layer.post_attention_layernorm.weight
        layer.mlp.forward = functools.partial(scaled, layer.mlp.forward, lambda weight=weight: weight.cos())


def bound_to_tensors(model: Any) -> None:
    for layer in model.model.layers:
        weight = layer.post_attention_layernorm.weight
        layer.mlp.forward = (lambda old, scaled: lambda x: scaled(old(x)))(layer.mlp.forward, weight.mul)


def weak(model: Any) -> None:
    norm = weakref.ref(model.model.norm)
    for layer in model.model.layers:
        layer.mlp.forward = (lambda old: lambda x: norm()(old(x)))(layer.mlp.forward)


def hooks(model: Any) -> None:
    """A hook compares the module that it gets with the one that it knows, and uses the weight of another."""
    first, norm = model.model.layers[0].mlp, model.model.norm
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out * norm.weight if module is first else out * 0.5)


def hooks_with_keywords(model: Any) -> None:
    norm = model.model.norm

    def before(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "hidden_states": given["hidden_states"] * norm.weight}

    def after(module: Any, args: Any, given: dict[str, Any], out: Any) -> Any:
        return out[0] + given["hidden_states"], *out[1:]

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)
        layer.self_attn.register_forward_hook(after, with_kwargs=True)

    def root(module: Any, args: Any, given: dict[str, Any], out: Any) -> Any:
        out["loss"] = out["loss"] if given.get("labels") is not None else None
        out["logits"] = out["logits"] * 1.0
        return out

    model.register_forward_hook(root, with_kwargs=True)


def itself(model: Any) -> None:
    """A function that holds itself, as a recursive one does, and shares a cell with another."""

    def again(old: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, depth: int = 2) -> Tensor:
            return forward(x, depth - 1) if depth else old(x)

        forward.seen = [forward, old]  # type: ignore[attr-defined]
        return lambda x: forward(x) * 0.5

    for layer in model.model.layers:
        layer.mlp.forward = again(layer.mlp.forward)


def frozen(model: Any) -> None:
    model.model.norm.weight.requires_grad_(False)
    hooks(model)


PATCHES = [closure, wraps, default_argument, containers, method_with_closure, partial, bound_to_tensors, weak, hooks]
PATCHES += [hooks_with_keywords, itself, frozen]


def make(patch: Callable[[Any], None], **changes: Any) -> LlamaForCausalLM:
    model = initialize(presets.build(tiny(**changes)), 0)
    patch(model)
    return model  # type: ignore[return-value]


def dense(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of the model itself, which is no copy: it becomes float64."""
    model.double()
    with Widened():
        loss = model(**given, use_cache=False).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_patched_model_trains_all_its_weights(patch: Callable[[Any], None]) -> None:
    given = batch()
    loss, gradients = dense(make(patch), given)
    got = run_plan(shardcomp.lower(make(patch), shardcomp.Policy.load("auto", precision="fp64"), seq=8), {"causal": given}, [])
    torch.testing.assert_close(got.loss["causal"], loss, rtol=1e-12, atol=0)
    assert_alike(got.gradients["causal"], gradients)


@pytest.mark.parametrize("policy", ["llama", "auto"])
@pytest.mark.parametrize("patch", [closure, wraps], ids=lambda patch: patch.__name__)
def test_a_patched_model_trains_under_tensor_parallelism(patch: Callable[[Any], None], policy: str) -> None:
    given = batch()
    loss, gradients = dense(make(patch), given)
    plan = shardcomp.Policy.load(policy, precision="fp64", tensor=2)
    got = run_plan(shardcomp.lower(make(patch), plan, seq=8), {"causal": given}, [])
    torch.testing.assert_close(got.loss["causal"], loss, rtol=1e-12, atol=0)
    assert_alike(got.gradients["causal"], gradients)


@pytest.mark.grid
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_model_on_meta_has_no_constants_either(patch: Callable[[Any], None]) -> None:
    model = presets.build(tiny())
    patch(model)
    program = capture(model, TRAINING, precision="fp32")
    assert list(program.buffers) == ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"][: len(program.buffers)]
    assert set(program.units[0].parameters) == set(program.parameters)


@pytest.mark.grid
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_no_copy_of_a_model_leads_back_to_it(patch: Callable[[Any], None]) -> None:
    model = make(patch, attention_dropout=0.1)
    for copied in (copy_model(model), in_dtype(model, torch.float64), without_dropout(model)[0]):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wide = next(copied.parameters()).dtype == torch.float64
        with torch.no_grad(), Widened() if wide else nullcontext():
            for p in copied.parameters():
                p.fill_(0.25)
            first = copied(**batch(), use_cache=False).loss
            for p in model.parameters():
                p.mul_(2)
            torch.testing.assert_close(copied(**batch(), use_cache=False).loss, first, rtol=1e-6, atol=0)
            for name, p in model.named_parameters():
                p.copy_(before[name])


def test_the_callers_functions_stay_as_they_were() -> None:
    model = make(closure)
    hooks(model)
    functions = [model.model.layers[i].mlp.forward for i in range(2)]
    held = [function.__closure__[0].cell_contents for function in functions]
    hooked = [dict(layer.mlp._forward_hooks) for layer in model.model.layers]
    program = capture(model, TRAINING, precision="fp64")
    assert self_check(program, model) < 1e-12
    for i, layer in enumerate(model.model.layers):
        assert layer.mlp.forward is functions[i] and functions[i].__closure__[0].cell_contents is held[i]
        assert held[i].__self__ is layer.mlp
        assert all(layer.mlp._forward_hooks[key] is hook for key, hook in hooked[i].items())


def test_a_function_that_does_not_lead_to_the_model_is_not_copied() -> None:
    model = make(lambda model: None)
    seen: list[Any] = []
    outside = nn.Linear(2, 2)
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(outside))
    [hook] = model.model.norm._forward_hooks.values()
    copied: Any = copy_model(model)
    assert list(copied.model.norm._forward_hooks.values()) == [hook]


def test_functions_that_share_a_variable_still_do() -> None:
    model = make(lambda model: None)
    norm, count = model.model.norm, 0

    def up(module: Any, args: Any, out: Any) -> Any:
        nonlocal count
        count += int(norm.weight.shape[0] > 0)

    def read() -> tuple[int, Any]:
        return count, norm

    model.model.norm.register_forward_hook(up)
    model.read = read
    copied: Any = copy_model(model)
    copied(**batch())
    assert copied.read() == (count, copied.model.norm) and read() == (1, norm)


def test_what_cannot_be_copied_is_kept_where_it_does_not_matter() -> None:
    """A hook that holds a trainer, with its lock and its model, and only counts."""
    model = make(lambda model: None)
    trainer = types.SimpleNamespace(model=model, lock=threading.Lock(), calls=0)

    def count(module: Any, args: Any, out: Any) -> None:
        trainer.calls += 1

    model.model.norm.register_forward_hook(count)
    program = capture(model, TRAINING, precision="fp64")
    assert self_check(program, model) < 1e-12 and trainer.calls and set(program.units[0].parameters) == set(program.parameters)


def test_hooks_of_parameters_are_neither_called_nor_in_the_way() -> None:
    model = make(closure)
    calls: list[str] = []
    model.lm_head.weight.register_hook(lambda gradient: calls.append("gradient"))
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    capture(model, TRAINING, precision="fp32")
    in_dtype(model, torch.float64)
    assert not calls and model.lm_head.weight._backward_hooks


GLOBAL: dict[str, Any] = {}


def reads_a_global(model: Any) -> None:
    GLOBAL["norm"], GLOBAL["weight"] = model.model.norm, model.model.layers[0].input_layernorm.weight
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: GLOBAL["norm"](out) * GLOBAL["weight"])


def reads_a_frozen_global(model: Any) -> None:
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    reads_a_global(model)


def reads_an_object_that_cannot_be_copied(model: Any) -> None:
    held = types.SimpleNamespace(lock=threading.Lock(), norm=model.model.norm, other=model.model.layers[0].input_layernorm)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: held.norm(out) * held.other.weight)


def reads_a_view(model: Any) -> None:
    GLOBAL["views"] = model.model.norm.weight.detach(), model.model.layers[0].input_layernorm.weight.data[:16]
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out * GLOBAL["views"][0] + GLOBAL["views"][1].sum())


class Patched(LlamaForCausalLM):
    held: Any = None


def reads_a_class(model: Any) -> None:
    model.__class__ = Patched
    Patched.held = model.model.norm, model.model.layers[0].input_layernorm
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: Patched.held[0](out) * Patched.held[1].weight)


UNREACHABLE = [reads_a_global, reads_a_frozen_global, reads_an_object_that_cannot_be_copied, reads_a_view, reads_a_class]


@pytest.mark.parametrize("patch", UNREACHABLE, ids=lambda patch: patch.__name__)
def test_a_parameter_that_would_be_a_constant_is_refused_by_name(patch: Callable[[Any], None]) -> None:
    model = make(lambda model: None)
    patch(model)
    with pytest.raises(CaptureError) as refused:
        capture(model, TRAINING, precision="fp32")
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert f"the parameter {name}, used in model.layers.0.mlp, model.layers.1.mlp, is reached past" in str(refused.value)
    assert "2 violations" in str(refused.value) and "types.MethodType" in str(refused.value)


@pytest.mark.grid
@pytest.mark.parametrize("patch", UNREACHABLE, ids=lambda patch: patch.__name__)
@pytest.mark.parametrize("how", [{"precision": "fp32", "meta": True}, {"precision": "bf16", "meta": False}], ids=str)
def test_a_parameter_that_does_not_even_fit_is_named_as_well(patch: Callable[[Any], None], how: dict[str, Any]) -> None:
    """A parameter on meta, or of another dtype than the capture's, among those of the copy."""
    model = presets.build(tiny()) if how["meta"] else make(lambda model: None)
    patch(model)
    with pytest.raises(CaptureError, match="the parameter model.norm.weight.* is reached past its module"):
        capture(model, TRAINING, precision=how["precision"])


def test_a_tensor_of_no_module_that_requires_a_gradient_is_refused() -> None:
    model = make(lambda model: None)
    scale = nn.Parameter(torch.ones(32))
    model.model.norm.register_forward_hook(lambda module, args, out: out * scale)
    with pytest.raises(CaptureError, match=r"of shape \(32,\), used in model.norm, requires a gradient and is not a param"):
        capture(model, TRAINING, precision="fp32")
    scale.requires_grad_(False)
    program = capture(model, TRAINING, precision="fp32")
    assert any(torch.equal(held.value, scale) for held in program.buffers.values())


def test_tied_parameters_are_named_together() -> None:
    model = initialize(presets.build(tiny(tie_word_embeddings=True)), 0)
    GLOBAL["head"] = model.lm_head  # type: ignore[union-attr]
    model.model.norm.register_forward_hook(lambda module, args, out: out + GLOBAL["head"].weight[0])  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match="the parameter model.embed_tokens.weight, used in model.norm"):
        capture(model, TRAINING, precision="fp32")
