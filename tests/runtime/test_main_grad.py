"""Gradients are added up by the products that make them: those of several micro-batches, in the masters' dtype, and those of
what several layers read."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import shardcomp
from shardcomp import presets
from shardcomp.kernels import wide_matmul
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime import unit
from shardcomp.runtime.linear import fan_out, linear
from shardcomp.runtime.main_grad import MainGrad
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.models import tiny

ROWS, IN, OUT = 12, 8, 6


def weight_of(wide: MainGrad | None) -> nn.Parameter:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(OUT, IN, dtype=torch.bfloat16))
    if wide is not None:
        weight.main_grad = wide  # type: ignore[attr-defined]
        wide._param.unsharded_param = weight
    return weight


def place(reduces: bool, held: Tensor | None = None) -> tuple[SimpleNamespace, MainGrad]:
    parameter = SimpleNamespace(unsharded_accumulated_grad=held, reduce_dtype=torch.float32, unsharded_param=None)
    return parameter, MainGrad(SimpleNamespace(reduce_grads=reduces), parameter)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    made = (torch.randn(3, 4, IN), torch.randn(OUT), torch.randn(3, 4, OUT))
    return tuple(each.bfloat16() for each in made)  # type: ignore[return-value]


def gradients(weight: nn.Parameter) -> tuple[Tensor, Tensor]:
    x, bias, of_result = operands()
    x.requires_grad_()
    bias.requires_grad_()
    made = linear(x, weight, bias)
    assert torch.equal(made, functional.linear(x, weight, bias))
    made.backward(of_result)
    assert x.grad is not None and bias.grad is not None
    return x.grad, bias.grad


def test_the_gradients_of_micro_batches_are_added_up_unrounded() -> None:
    x, _, of_result = operands()
    exact = of_result.reshape(ROWS, OUT).T.float() @ x.reshape(ROWS, IN).float()
    parameter, wide = place(reduces=False)
    plain = weight_of(None)
    expected = gradients(plain)
    for times in (1, 2, 3):
        weight = weight_of(wide)
        for ours, theirs in zip(gradients(weight), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert weight.grad is None
        torch.testing.assert_close(parameter.unsharded_accumulated_grad, times * exact, rtol=1e-6, atol=1e-6)
    assert plain.grad is not None and not torch.equal(plain.grad.float(), exact)  # what rounding would have made of it


def test_what_is_reduced_at_once_is_not_widened() -> None:
    parameter, wide = place(reduces=True)
    weight, plain = weight_of(wide), weight_of(None)
    gradients(weight)
    gradients(plain)
    assert parameter.unsharded_accumulated_grad is None
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, plain.grad)


@pytest.mark.parametrize(
    ("world", "options", "wide_per_step"),
    [
        (1, {}, 3),
        (1, {"recompute": "full"}, 3),
        (2, {"tensor": 2, "recompute": "selective"}, 3),
        (2, {"data": 2, "zero": 1}, 3),
        (2, {"data": 2, "zero": 3}, 0),
        (2, {"pipeline": 2}, 3),
        (2, {"pipeline": 2, "schedule": "zero_bubble"}, 0),
    ],
)
def test_each_matrix_of_a_layer_is_widened(
    world: int, options: dict[str, Any], wide_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every micro-batch where nothing is summed over dp at once, also in those whose sum is handed on at last."""
    config = tiny(num_hidden_layers=2)
    policy = shardcomp.Policy.load("llama", precision="bf16", micro_batch=2, **options)
    lowered = shardcomp.lower(initialize(presets.build(config), 0), policy, world, seq=8)
    added: list[bool] = []
    true = MainGrad.add

    def watched(self: MainGrad, of_results: Tensor, x: Tensor) -> Tensor | None:
        made = true(self, of_results, x)
        added.append(made is None)
        return made

    monkeypatch.setattr(MainGrad, "add", watched)
    beside: list[bool] = []
    theirs = FSDPParam.accumulate_unsharded_grad_if_needed

    def accumulated(self: Any) -> None:
        if self.unsharded_accumulated_grad is not None:
            beside.append(self.unsharded_param.grad is not None)
        theirs(self)

    monkeypatch.setattr(FSDPParam, "accumulate_unsharded_grad_if_needed", accumulated)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        tokens = torch.randint(0, config.vocab_size, (6, 8), generator=torch.Generator().manual_seed(0))
        sharded.train_step(input_ids=tokens, labels=tokens)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sharded.parameters())

    run_ranks(world, work)
    of_layers = 7 * 2 // options.get("pipeline", 1)
    assert sum(added) == wide_per_step * of_layers * world
    # What FSDP adds to them in the later micro-batches: norms' weights, and what the first and the last unit have.
    assert not wide_per_step or sum(beside) <= (2 * 2 + 3) * 2 * world


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), ()])
def test_what_several_layers_read_has_the_gradient_of_all(used: tuple[int, ...], others: bool) -> None:
    """Also where some of them lead to no loss, or something else reads it."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(OUT, IN, dtype=torch.float64)) for _ in range(3)]
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)

    def run(shared: bool) -> list[Tensor]:
        read = fan_out(x * 2) if shared else x * 2
        results = [linear(read, weight) for weight in weights]
        total = torch.stack(
            [x.sum(), *(results[i].square().sum() for i in used), *([read.sin().sum()] if others else [])]
        ).sum()
        wanted = [x, *(weights[i] for i in used)]
        found = list(torch.autograd.grad(total, wanted, retain_graph=True))
        return found + list(torch.autograd.grad(total, wanted))  # nothing is left over from the first

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_gradients_of_what_layers_read_are_not_added_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch's own products, which are counted, whatever this CPU has instructions for.
    monkeypatch.setattr(wide_matmul, "_BF16_IS_SLOW", False)
    monkeypatch.setattr(wide_matmul, "_blas", lambda: None)
    config = tiny(num_hidden_layers=2)
    lowered = shardcomp.lower(initialize(presets.build(config), 0), shardcomp.Policy.load("llama"), seq=8)
    counted: Counter[Any] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted[func] += 1
            return func(*args, **(kwargs or {}))

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        tokens = torch.randint(0, config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
        with Count():
            sharded.train_step(input_ids=tokens, labels=tokens)

    run_ranks(1, work)
    joint = counted.copy()
    counted.clear()
    monkeypatch.setattr(unit, "fan_out", lambda x: x)
    run_ranks(1, work)
    aten, of_layers = torch.ops.aten, 2 * 3  # k and v to q, up to gate
    assert joint[aten.addmm_.default] - counted[aten.addmm_.default] == of_layers
    assert counted[aten.mm.default] - joint[aten.mm.default] == of_layers
