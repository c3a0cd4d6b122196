"""Recompute: the same numbers to the bit, once for each unit and micro-batch, and nothing held in between."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.nn.functional import linear, silu

import shardcomp
from shardcomp.errors import InternalError
from shardcomp.ir.mesh import Mesh
from shardcomp.kernels import dropout
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime import drop, keep
from shardcomp.runtime.random import Streams
from shardcomp.runtime.recompute import SavedCall, recompute, saved_calls, split_backward
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny
from support.storages import Made

WIDTH = 6


class Summed(torch.autograd.Function):
    """Stands for a collective: the identity, which counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, done: Counter[str]) -> Tensor:
        done["summed"] += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Private(torch.autograd.Function):
    """x³, which saves a tensor that is neither its operand nor its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, done: Counter[str]) -> Tensor:
        done["private"] += 1
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


class Block(nn.Module):
    """A unit written by hand: a norm, a gated product, and one whose result is summed and added last."""

    def __init__(self, selective: bool = False) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = nn.Parameter(torch.randn(8, WIDTH)), nn.Parameter(torch.randn(WIDTH, 8))
        self.done: Counter[str] = Counter()
        self.call: tuple[Callable[..., Tensor], Callable[..., Tensor]] = (keep, drop) if selective else (plain, plain)

    def product(self, name: str) -> Callable[..., Tensor]:
        def run(x: Tensor, w: Tensor) -> Tensor:
            found = linear(x, w)
            self.done[name] += 1
            return found

        return run

    def body(self, x: Tensor, table: Tensor, other: Tensor) -> Tensor:
        kept, thrown = self.call
        beside = x + other.sin()
        normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.norm * table
        up = kept(self.product("up"), normed, self.up)
        cubed = kept(Private.apply, up, self.done)
        down = thrown(self.product("down"), silu(up) * cubed.tanh(), self.down)
        return beside + thrown(Summed.apply, down, self.done)

    def forward(self, x: Tensor, table: Tensor, other: Tensor) -> Tensor:
        return recompute(self.body, (x, table, other), "some.unit")


def plain(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def blocks(count: int, selective: bool = False) -> list[Block]:
    torch.manual_seed(0)
    return [Block(selective).double() for _ in range(count)]


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x, table, other = (torch.randn(3, WIDTH, dtype=torch.float64) for _ in range(3))
    return x.requires_grad_(), table, other.requires_grad_()


def gradients(chain: list[Block], given: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [p.grad for block in chain for p in block.parameters()] + [x.grad for xs in given for x in xs if x.requires_grad]  # type: ignore[misc]


def through(chain: list[Block], given: tuple[Tensor, ...], run: Callable[[Block], Any] = lambda block: block) -> Tensor:
    x, table, other = given
    for block in chain:
        x = run(block)(x, table, other)
    return x


def expected(micro_batches: int, order: list[int] | None = None) -> list[Tensor]:
    """The gradients without recompute."""
    chain, given = blocks(3), [inputs(i) for i in range(micro_batches)]
    results = [through(chain, xs, lambda block: block.body) for xs in given]
    for index in order or range(micro_batches):
        results[index].square().sum().backward()
    return gradients(chain, given)


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# One unit after the other.


@pytest.mark.parametrize("selective", [False, True])
def test_gradients_are_the_same_to_the_bit_and_every_unit_runs_again_once(selective: bool) -> None:
    order = [2, 0, 3, 1]
    chain, given = blocks(3, selective), [inputs(i) for i in range(4)]
    with saved_calls() as made:
        results = [through(chain, xs) for xs in given]
    for index in order:
        results[index].square().sum().backward()
    assert same(gradients(chain, given), expected(4, order))
    assert [frame.runs for frame in made] == [1] * 12
    once_more = 4 if selective else 8
    for block in chain:
        assert block.done == {"up": once_more, "private": once_more, "down": 4, "summed": 4}


def test_nothing_is_held_but_the_inputs() -> None:
    chain, given = blocks(1), inputs(0)
    with Made() as made:
        result = through(chain, given)
    assert made.left([result]) == 0
    kept = blocks(1, selective=True)
    with Made() as made:
        result = through(kept, given)
    assert made.left([result]) == 3 * 3 * 8 * 8  # what goes up, its cube, and what the cube saves


def test_what_was_computed_again_goes_with_the_backward_as_it_proceeds() -> None:
    chain, given = blocks(2), inputs(0)
    with saved_calls() as made:
        result = through(chain, given)
    loss = result.square().sum()
    filled: list[list[bool]] = []
    given[0].register_hook(lambda _: filled.append([any(s.tensor is not None for _, s in f.live()) for f in made]))
    loss.backward()
    assert filled == [[False, False]]
    references = [weakref.ref(frame) for frame in made]
    made.clear()
    del result
    assert all(ref() is None for ref in references)  # though the loss, and with it the graph, is still there
    assert loss.grad_fn is not None


def test_a_graph_that_is_thrown_away_leaves_nothing() -> None:
    chain, given = blocks(2), inputs(0)
    with saved_calls() as made:
        through(chain, given)
    references = [weakref.ref(frame) for frame in made]
    made.clear()
    gc.collect()
    assert all(ref() is None for ref in references)


def test_a_graph_that_is_kept_is_computed_again_for_every_backward() -> None:
    chain, given = blocks(2, selective=True), inputs(0)
    with saved_calls() as made:
        loss = through(chain, given).square().sum()
    first = torch.autograd.grad(loss, given[0], retain_graph=True)[0]
    assert [frame.runs for frame in made] == [1, 1]
    assert not any(slot.tensor is not None and not slot.own for frame in made for _, slot in frame.live())
    assert torch.equal(first, torch.autograd.grad(loss, given[0], retain_graph=True)[0])
    assert [frame.runs for frame in made] == [2, 2]


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("on", [True, False])
def test_a_split_backward_computes_once(selective: bool, on: bool) -> None:
    chain, given = blocks(3, selective), [inputs(0), inputs(1)]
    weights = [p for block in chain for p in block.parameters()]
    with saved_calls() as made:
        losses = [through(chain, xs).square().sum() for xs in given]
    later = []
    for loss, xs in zip(losses, given, strict=True):
        graded = [x for x in xs if x.requires_grad]
        with split_backward(on):
            found, groups = stage_backward_input([loss], None, graded, iter(weights))
        for x, gradient in zip(graded, found, strict=True):
            x.grad = gradient
        later.append(groups)
    assert any(slot.tensor is not None for frame in made for _, slot in frame.live() if not slot.own) == on
    for groups in later:
        stage_backward_weight(iter(weights), groups)
    assert same(gradients(chain, given), expected(2))
    assert [frame.runs for frame in made] == [1 if on else 2] * 6
    for frame in made:
        frame.free_recomputed()
    assert not any(slot.tensor is not None for frame in made for _, slot in frame.live() if not slot.own)


def test_a_backward_may_run_in_another_thread() -> None:
    """As it does on a GPU: what is decided where it begins holds there, too."""
    chain, given = blocks(3, selective=True), inputs(0)
    with saved_calls() as made:
        loss = through(chain, given).square().sum()
    with split_backward():
        other = threading.Thread(target=lambda: loss.backward(retain_graph=True))
        other.start()
        other.join()
    assert same(gradients(chain, [given]), expected(1))
    assert all(any(s.tensor is not None and not s.own for _, s in frame.live()) for frame in made)
    loss.backward()
    assert [frame.runs for frame in made] == [1] * 3


def test_without_gradients_it_is_the_call_itself() -> None:
    chain, given = blocks(1), inputs(0)
    with saved_calls() as made:
        with torch.no_grad():
            found = through(chain, given)
        detached = tuple(x.detach() for x in given)
        again = through(chain, detached)
    assert not made and torch.equal(found, again) and not found.requires_grad and again.requires_grad


def test_frames_are_of_the_thread_that_makes_them() -> None:
    wanted = expected(1)
    chains = [(blocks(3, selective=True), [inputs(0) for _ in range(5)]) for _ in range(4)]
    found: dict[int, tuple[list[int], bool]] = {}

    def work(index: int) -> None:
        chain, given = chains[index]
        right = True
        with saved_calls() as made:
            for each in given:
                for p in (p for block in chain for p in block.parameters()):
                    p.grad = None
                through(chain, each).square().sum().backward()
                right = right and same(gradients(chain, [each]), wanted)
        found[index] = [frame.runs for frame in made], right

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: ([1] * 15, True) for i in range(4)}


# What must be noticed.


def test_an_exception_of_the_second_run_names_the_unit() -> None:
    calls = []

    def body(x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > 1:
            raise ValueError("not twice")
        return x.exp().exp()

    with pytest.raises(ValueError, match="not twice") as failure:
        recompute(body, (inputs(0)[0],), "model.layers.7").sum().backward()
    assert any("model.layers.7" in note for note in failure.value.__notes__)
    x = inputs(0)[0]
    recompute(lambda t: t.exp(), (x,), "next").sum().backward()  # nothing of it is left in the thread
    assert torch.equal(x.grad, x.detach().exp())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda x: x + 1, "saved fewer values"),
        (lambda x: x[:2].exp().sum() + x, "that was"),
    ],
)
def test_a_second_run_that_does_something_else_is_refused(second: Callable[[Tensor], Tensor], message: str) -> None:
    bodies = [lambda x: x.exp(), second]
    with pytest.raises(InternalError, match=message):
        recompute(lambda x: bodies.pop(0)(x), (inputs(0)[0],), "some.unit").sum().backward()


@pytest.mark.parametrize("fault", ["stale", "of another micro-batch", "out of order", "a wrong alias"])
def test_wrong_values_would_be_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    chain, given = blocks(3, selective=True), [inputs(i) for i in range(2)]
    with saved_calls() as made:
        results = [through(chain, xs) for xs in given]
    if fault == "stale":
        made[1].inputs = (made[1].inputs[0] + 1e-6, *made[1].inputs[1:])
    elif fault == "of another micro-batch":
        made[1].inputs = made[4].inputs
    elif fault == "out of order":
        true = SavedCall.recompute

        def again(frame: SavedCall) -> None:
            true(frame)
            slots = [slot for _, slot in frame.live() if slot.tensor is not None and not slot.own]
            for slot in slots[:2]:
                slot.tensor = slots[2].tensor

        monkeypatch.setattr(SavedCall, "recompute", again)
    else:
        marked = made[1].marked[0]
        marked.aliases = {slot: (0, size, stride[::-1], at) for slot, (_, size, stride, at) in marked.aliases.items()}
    try:
        for result in results:
            result.square().sum().backward()
    except RuntimeError:
        return  # noticed by its shape
    assert not same(gradients(chain, given), expected(2))


def test_a_result_that_was_wrongly_thrown_away_poisons_the_gradients() -> None:
    chain, given = blocks(1, selective=True), inputs(0)
    chain[0].call = drop, drop
    through(chain, given).square().sum().backward()
    assert all(p.grad is not None and p.grad.isnan().any() for p in (chain[0].up, chain[0].down))


# Random numbers.


def test_the_second_run_draws_what_the_first_did() -> None:
    def body(streams: Streams) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x = keep(dropout, x.exp(), p=0.5, random=streams.own)
            x = dropout(x.sin(), 0.5, streams.own).exp()
            return dropout(x.cos(), 0.3, streams.shared).exp()

        return run

    found = []
    for again in (True, False):
        streams = Streams(0, Mesh(), Mesh().coordinates(0), torch.device("cpu"))
        given = [inputs(i)[0] for i in range(3)]
        run = body(streams)
        results = [recompute(run, (x,), "unit", streams) if again else run(x) for x in given]
        for index in (1, 2, 0):
            results[index].sum().backward()
        found.append([x.grad for x in given] + [dropout(torch.ones(9), 0.5, streams.own)])
    assert same(*found)


# Whole models.


def trained(lowered: Lowered, rows: int) -> list[tuple[list[Tensor], list[int]]]:
    """For each rank: losses and gradients of two steps, and how often each call was recomputed."""
    weights, batch = weights_of(lowered), batches(97, rows, 8, 0)["causal"]
    data = lowered.mesh.dp

    def work(rank: int) -> tuple[list[Tensor], list[int]]:
        sharded = allocate(lowered, weights)
        place = sharded.mesh.get_local_rank("dp")
        mine = {name: held.chunk(data)[place] for name, held in batch.items()}
        with saved_calls() as made:
            losses = [sharded.train_step(**mine).loss for _ in range(2)]
        held = [p.grad for p in sharded.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in held]
        return losses + [g.clone() for g in local], [frame.runs for frame in made]

    return run_ranks(lowered.mesh.world_size, work)


PLANS: list[dict[str, Any]] = [
    {"tensor": 2, "precision": "fp32", "micro_batch": 1},
    {"tensor": 2, "precision": "bf16", "sequence_parallel": False},
    {"tensor": 2, "data": 2, "precision": "bf16", "zero": 3, "micro_batch": 1},
    {"pipeline": 2, "precision": "fp32", "schedule": "gpipe", "micro_batch": 1},
    {"pipeline": 2, "tensor": 2, "precision": "fp32", "schedule": "interleaved", "zero": 1, "micro_batch": 1},
    {"pipeline": 2, "data": 2, "precision": "fp32", "schedule": "zero_bubble", "zero": 3, "micro_batch": 1},
    {"pipeline": 2, "data": 2, "precision": "fp64", "schedule": "dualpipev", "zero": 2, "micro_batch": 1},
]


@pytest.mark.grid
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(str(value) for value in plan.values()))
def test_a_model_trains_to_the_same_bits(plan: dict[str, Any]) -> None:
    config = tiny(num_hidden_layers=4, attention_dropout=0.2)
    ranks = plan.get("tensor", 1) * plan.get("data", 1) * plan.get("pipeline", 1)
    rows = 4 * plan.get("data", 1)
    policy = shardcomp.Policy.load("llama", **plan)
    lowered = shardcomp.lower(config, policy, ranks, seq=8)
    wanted = trained(lowered, rows)
    for choice, layers in (("full", 4), ("selective", 4), ("every:2", 2)):
        found = trained(shardcomp.lower(config, policy.replace(recompute=choice), ranks, seq=8), rows)
        for (numbers, runs), (exact, none) in zip(found, wanted, strict=True):
            assert same(numbers, exact) and not none
            assert set(runs) <= {1}
        # Every layer, for every micro-batch of both steps.
        pieces = rows // plan.get("data", 1) // plan.get("micro_batch", 4)
        copies = plan.get("data", 1) * plan.get("tensor", 1)
        assert sum(len(runs) for _, runs in found) == copies * layers * pieces * 2


@pytest.mark.long  # a model trains to the same bits under zero 3 too
def test_units_put_back_in_pieces_are_computed_again_from_gathered_weights() -> None:
    config, plan = tiny(num_hidden_layers=4), {"pipeline": 2, "data": 2, "precision": "fp64", "zero": 3, "micro_batch": 1}
    policy = shardcomp.Policy.load("llama", **plan, schedule="zero_bubble", recompute="selective")
    lowered = shardcomp.lower(config, policy, 4, seq=8)
    program = lowered.program
    program.units = [replace(u, plan=replace(u.plan, reshard=True)) if u.parameters else u for u in program.units]
    wanted = trained(shardcomp.lower(config, policy.replace(recompute="none"), 4, seq=8), 8)
    for (numbers, runs), (exact, _) in zip(trained(lowered, 8), wanted, strict=True):
        assert same(numbers, exact) and set(runs) == {1}


def test_torch_s_own_random_numbers_are_left_alone() -> None:
    lowered = shardcomp.lower(tiny(attention_dropout=0.5), shardcomp.Policy.load("llama", recompute="full"), seq=8)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state()
    trained(lowered, 1)
    assert torch.equal(before, torch.get_rng_state())
