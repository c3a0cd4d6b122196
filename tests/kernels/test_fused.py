"""The fused operators against HuggingFace's modules, bit for bit, and against float64; their gradients; and their rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.library import opcheck
from torch.nn import functional
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotary
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gptj.modeling_gptj import rotate_every_two
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from shardcomp import kernels, runtime
from shardcomp.fusion.equivalence import EQUAL_BITS, equal_bits
from shardcomp.fusion.matchers import MATCHERS
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import Value
from shardcomp.kernels import (
    add_rms_norm,
    geglu,
    layer_norm,
    linear_cross_entropy,
    register,
    rms_norm,
    rotary,
    small_cases,
    swiglu,
)
from shardcomp.kernels.counts import NAMES
from shardcomp.policy.options import PLACED
from shardcomp.policy.toml_reader import COUNTED
from shardcomp.sharding.rules import factoring
from support.implementations import references

ops = torch.ops.shardcomp
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
Operator = Callable[..., Any]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def with_weight(norm: nn.Module, weight: Tensor) -> nn.Module:
    """A module that computes with `weight` itself."""
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return norm


def tables(s: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, [1, s, d], the halves alike."""
    angles = draw(1, s, d // 2).detach()
    both = torch.cat((angles, angles), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def as_model(function: Operator) -> Operator:
    """What a model computes; without its narrow casts where the operands are float64."""

    def run(*operands: Tensor) -> Any:
        with Widened() if operands[0].dtype == torch.float64 else nullcontext():
            return function(*operands)

    return run


def llama_norm(x: Tensor, w: Tensor) -> Tensor:
    return with_weight(LlamaRMSNorm(x.shape[-1], EPS), w)(x)


def llama_residual(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return llama_norm(x + r, w), x + r


def gptj_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    size = cos.shape[-1]
    turned = [x[..., :size] * cos + rotate_every_two(x[..., :size]) * sin for x in (q, k)]
    return tuple(torch.cat((t, x[..., size:]), -1) for t, x in zip(turned, (q, k), strict=True))


def cases(
    dtype: torch.dtype, h: int = 131, rows: tuple[int, ...] = (7, 67)
) -> dict[str, tuple[Operator, Operator, list[Tensor]]]:
    """What HuggingFace computes, what the operator computes, and the operands."""
    x, r, w, b = (
        draw(*rows, h, dtype=dtype),
        draw(*rows, h, dtype=dtype, seed=1),
        draw(h, dtype=dtype),
        draw(h, dtype=dtype, seed=2),
    )
    q, k = draw(2, 67, 6, 34, dtype=dtype).transpose(1, 2), draw(2, 67, 3, 34, dtype=dtype).transpose(1, 2)
    cos, sin = tables(67, 34, dtype)
    part = [table[..., :10].unsqueeze(1) for table in (cos, sin)]
    found: dict[str, tuple[Operator, Operator, list[Tensor]]] = {
        "rms_norm": (llama_norm, lambda x, w: rms_norm(x, w, eps=EPS, round_first=True), [x, w]),
        "rms_norm, 1 + w": (
            lambda x, w: with_weight(GemmaRMSNorm(h, EPS), w)(x),
            lambda x, w: rms_norm(x, w, eps=EPS, offset=1.0),
            [x, w],
        ),
        "add_rms_norm": (
            llama_residual,
            lambda x, r, w: add_rms_norm(x, r, w, eps=EPS, round_first=True),
            [x, r, w],
        ),
        "layer_norm": (
            lambda x, w, b: functional.layer_norm(x, (h,), w, b, EPS),
            lambda x, w, b: layer_norm(x, w, b, eps=EPS),
            [x, w, b],
        ),
        "layer_norm, stepwise": (
            lambda x, w: with_weight(CohereLayerNorm(h, EPS), w)(x),
            lambda x, w: layer_norm(x, w, eps=EPS, stepwise=True),
            [x, w],
        ),
        "rotary": (
            lambda q, k: apply_rotary_pos_emb(q, k, cos, sin),
            lambda q, k: rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1), round_each=True),
            [q, k],
        ),
        "rotary, partial and interleaved": (
            lambda q, k: gptj_rotary(q, k, *part),
            lambda q, k: rotary(q, k, *part, interleaved=True, round_each=True),
            [q, k],
        ),
        "rotary, interleaved, one rounding": (
            lambda q, k: cohere_rotary(q, k, cos, sin),
            lambda q, k: rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=True),
            [q, k],
        ),
        "swiglu": (lambda x, r: functional.silu(x) * r, lambda x, r: swiglu(x, r, round_first=True), [x, r]),
        "geglu": (lambda x, r: functional.gelu(x) * r, lambda x, r: geglu(x, r, round_first=True), [x, r]),
        "geglu, tanh": (
            lambda x, r: functional.gelu(x, approximate="tanh") * r,
            lambda x, r: geglu(x, r, tanh=True, round_first=True),
            [x, r],
        ),
    }
    return {name: (as_model(theirs), ours, operands) for name, (theirs, ours, operands) in found.items()}


@pytest.fixture(params=["library", "reference"])
def provider(request: pytest.FixtureRequest) -> Iterator[None]:
    """What runs the operators: the library, where there is one, and their references."""
    with references() if request.param == "reference" else nullcontext():
        yield


either = pytest.mark.usefixtures("provider")
NAMES_OF_CASES = list(cases(torch.float64, 8, (2, 3)))


def results(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, tuple) else [made]


def gradients(function: Operator, operands: list[Tensor]) -> list[Tensor]:
    given = [operand.detach().requires_grad_() for operand in operands]
    made = results(function(*given))
    seeds = [draw(*out.shape, seed=i).detach().to(out.dtype) for i, out in enumerate(made)]
    return list(torch.autograd.grad(made, given, seeds))


@either
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_the_bits_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    theirs, ours, operands = cases(dtype)[name]
    for made, expected in zip(results(ours(*operands)), results(theirs(*operands)), strict=True):
        assert made.dtype == expected.dtype == dtype
        assert equal_bits(made, expected) >= EQUAL_BITS


@either
@pytest.mark.parametrize("shape", [(7, 67), (1,), (), (0, 3)])
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_values_and_gradients_are_those_of_plain_operators_in_float64(name: str, shape: tuple[int, ...]) -> None:
    theirs, ours, operands = cases(torch.float64, 13, shape)[name]
    torch.testing.assert_close(results(ours(*operands)), results(theirs(*operands)), rtol=1e-12, atol=1e-12)
    for made, expected in zip(gradients(ours, operands), gradients(theirs, operands), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-11, atol=1e-11)


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_gradients_are_as_near_to_float64_as_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    theirs, ours, operands = cases(dtype)[name]
    exact = gradients(cases(torch.float64)[name][1], [operand.double() for operand in operands])
    for made, expected, true in zip(gradients(ours, operands), gradients(theirs, operands), exact, strict=True):
        apart, allowed = (float((each.double() - true).norm()) for each in (made, expected))
        assert apart <= 1.05 * allowed


CALLS: dict[str, tuple[Any, ...]] = {
    "rms_norm": (draw(3, 5, 8), draw(8), EPS, 0.0, True),
    "rms_norm without a weight, turned": (draw(5, 3, 8).transpose(0, 1), None, EPS, 0.0, False),
    "add_rms_norm": (draw(3, 5, 8), draw(3, 5, 8, seed=1), draw(8), EPS, 1.0, False),
    "layer_norm": (draw(3, 5, 8), draw(8), None, EPS, False),
    "layer_norm stepwise": (draw(3, 5, 8), None, draw(8), EPS, True),
    "rotary": (
        draw(2, 5, 4, 8).transpose(1, 2),
        draw(2, 2, 5, 8),
        *(t.unsqueeze(1) for t in tables(5, 6, torch.float64)),
        False,
        True,
    ),
    "rotary interleaved": (
        draw(2, 5, 4, 8),
        draw(2, 5, 2, 8),
        *(t.unsqueeze(2) for t in tables(5, 8, torch.float64)),
        True,
        False,
    ),
    "gated": (draw(3, 5, 16)[..., :8], draw(3, 5, 16)[..., 8:], "silu", True),
}


def operator(name: str) -> Any:
    return getattr(ops, name.partition(" ")[0]).default


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_is_what_torch_asks_of_one(name: str) -> None:
    opcheck(operator(name), CALLS[name])


@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_it_compiles_and_exports_as_it_is(name: str) -> None:
    _, ours, operands = cases(torch.float32, 16, (2, 3))[name]
    operands = [operand.detach().requires_grad_() for operand in operands]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(gradients(compiled, operands), gradients(ours, operands), strict=True))

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return ours(*given)

    graph = torch.export.export(Module(), tuple(operands), strict=False).graph
    assert [str(node.target) for node in graph.nodes if "shardcomp" in str(node.target)] == [str(operator_of(name))]


def operator_of(name: str) -> Any:
    kernel = name.partition(",")[0]
    return operator("gated" if kernel in ("swiglu", "geglu") else kernel)


@either
@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_what_is_not_finite_stays_so_where_it_is_in_the_model(name: str) -> None:
    theirs, ours, operands = cases(torch.float32)[name]
    broken = [operand.detach().clone() for operand in operands]
    places = torch.arange(broken[0].numel()).reshape(broken[0].shape)
    broken[0][places % 97 == 3] = float("inf")
    broken[0][places % 1001 == 5] = float("nan")
    for made, expected in zip(results(ours(*broken)), results(theirs(*broken)), strict=True):
        assert torch.equal(made.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", NAMES_OF_CASES)
def test_the_same_numbers_come_out_every_time(name: str) -> None:
    _, ours, operands = cases(torch.bfloat16)[name]
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours, operands), gradients(ours, operands), strict=True))


@either
def test_the_norm_of_a_sum_may_be_unused_or_the_sum_may_be() -> None:
    x, r, w = draw(3, 8), draw(3, 8, seed=1), draw(8)
    total = add_rms_norm(x, r, w, eps=EPS)[1]
    assert all(torch.equal(g, torch.ones_like(x)) for g in torch.autograd.grad(total.sum(), (x, r)))
    found = torch.autograd.grad(add_rms_norm(x, r, w, eps=EPS)[0].sum(), (x, r, w))
    expected = torch.autograd.grad(cases(torch.float64)["add_rms_norm"][0](x, r, w)[0].sum(), (x, r, w))
    torch.testing.assert_close(found, expected)


@either
def test_numbers_of_one_rounding_are_nearer_to_float64() -> None:
    for name in ("rms_norm", "rotary", "swiglu"):
        _, ours, operands = cases(torch.bfloat16)[name]
        once = {
            "rms_norm": lambda x, w: rms_norm(x, w, eps=EPS),
            "rotary": lambda q, k: rotary(q, k, *(t.unsqueeze(1) for t in tables(67, 34, torch.bfloat16))),
            "swiglu": swiglu,
        }[name]
        exact = results(once(*(operand.double() for operand in operands)))[0]
        apart = [float((results(each(*operands))[0].double() - exact).norm()) for each in (once, ours)]
        assert apart[0] < 0.9 * apart[1]


def nodes(function: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Node, list[Tensor]]:
    graph, tensors = fx.Graph(), [each for each in args if isinstance(each, Tensor)]
    lifted = []
    for i, tensor in enumerate(tensors):
        lifted.append(graph.placeholder(f"x{i}"))
        lifted[-1].meta = {"value": Value(tuple(tensor.shape), tensor.dtype, True)}
    call = graph.call_function(function, tuple(lifted), kwargs)
    made = tuple(Value(tuple(out.shape), out.dtype, True) for out in results(function(*args, **kwargs)))
    call.meta = {"value": made if len(made) > 1 else made[0]}
    return call, tensors


RULED: dict[str, tuple[Operator, tuple[Any, ...], dict[str, Any]]] = {
    "rms_norm": (rms_norm, (draw(2, 4, 6), draw(6)), {"eps": EPS}),
    "add_rms_norm": (add_rms_norm, (draw(2, 4, 6), draw(2, 4, 6, seed=1), draw(6)), {"eps": EPS}),
    "layer_norm": (layer_norm, (draw(2, 4, 6), draw(6), draw(6, seed=1)), {"eps": EPS}),
    "rotary": (rotary, (draw(2, 4, 6, 8), draw(2, 2, 6, 8), *(t.unsqueeze(1) for t in tables(6, 8, torch.float64))), {}),
    "rotary, heads inside": (
        rotary,
        (draw(2, 6, 4, 8), draw(2, 6, 4, 8), *(t.unsqueeze(2) for t in tables(6, 4, torch.float64))),
        {"interleaved": True},
    ),
    "swiglu": (swiglu, (draw(2, 4, 6), draw(2, 4, 6, seed=1)), {}),
    "geglu": (geglu, (draw(2, 4, 6), draw(2, 4, 6, seed=1)), {"tanh": True}),
}


def ruled_factors() -> Iterator[tuple[str, str]]:
    for name, (function, args, kwargs) in RULED.items():
        rule = factoring(nodes(function, args, kwargs)[0])
        assert rule is not None
        yield from ((name, factor) for factor in rule.factors())


@pytest.mark.parametrize(("name", "factor"), list(ruled_factors()))
def test_pieces_of_the_operands_give_pieces_of_the_results(name: str, factor: str) -> None:
    function, args, kwargs = RULED[name]
    node, tensors = nodes(function, args, kwargs)
    rule = factoring(node)
    assert rule is not None
    whole = [tensor.detach().requires_grad_(i < 2 or "rotary" not in name) for i, tensor in enumerate(tensors)]
    expected = results(function(*whole, **kwargs))
    seeds = [draw(*out.shape, seed=i).detach() for i, out in enumerate(expected)]
    torch.autograd.backward(expected, seeds)

    def pieces(tensor: Tensor, dims: tuple[str | None, ...]) -> list[Tensor]:
        return [p.detach() for p in tensor.chunk(2, dims.index(factor))] if factor in dims else [tensor.detach()] * 2

    cut = list(zip(*(pieces(t, d) for t, d in zip(whole, rule.operands, strict=True)), strict=True))
    local = [[p.clone().requires_grad_(t.requires_grad) for p, t in zip(rank, whole, strict=True)] for rank in cut]
    made = [results(function(*rank, **kwargs)) for rank in local]
    for rank, outs in enumerate(made):
        torch.autograd.backward(outs, [pieces(s, d)[rank] for s, d in zip(seeds, rule.results, strict=True)])
    for j, (dims, out) in enumerate(zip(rule.results, expected, strict=True)):
        torch.testing.assert_close(torch.cat([outs[j] for outs in made], dims.index(factor)), out)
    for j, (dims, tensor) in enumerate(zip(rule.operands, whole, strict=True)):
        if tensor.grad is not None:
            parts = [rank[j].grad for rank in local]
            total = torch.cat(parts, dims.index(factor)) if factor in dims else torch.stack(parts).sum(0)  # type: ignore[arg-type]
            torch.testing.assert_close(total, tensor.grad)


def test_options_and_policies_know_the_kernels_that_there_are() -> None:
    fused = {name for matcher in MATCHERS for name in matcher.kernels} | {linear_cross_entropy.__name__}
    assert set(PLACED) == fused and set(COUNTED) == set(NAMES)


def test_every_function_that_is_registered_is_public() -> None:
    assert set(kernels.__all__) == register.FUNCTIONS.keys() <= set(runtime.__all__)
    for name, function in register.FUNCTIONS.items():
        assert getattr(kernels, name) is getattr(runtime, name) is function


def test_every_operator_has_a_small_case() -> None:
    assert {operator for calls in small_cases.calls().values() for operator in calls} == register.REFERENCES.keys()
