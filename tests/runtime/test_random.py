"""Dropout on many ranks: which of them draw the same, that it can be repeated, and that the streams are chosen rightly."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import shardcomp
from shardcomp import Policy, presets
from shardcomp.ir.mesh import Mesh
from shardcomp.kernels.dropout import OWN, SAME_SHARD, SHARED, Stream
from shardcomp.lowered import Lowered
from shardcomp.materialize import allocate, weights_of
from shardcomp.policy.patterns import Entry, parse
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.random import Streams
from shardcomp.verification.dense_model import batches
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.families import tiny_config
from support.models import tiny

CPU = torch.device("cpu")
NAMES = (SHARED, OWN, SAME_SHARD)
LENGTH = 8


# The streams of a world.


def streams(mesh: Mesh, seed: int = 0) -> list[Streams]:
    return [Streams(seed, mesh, mesh.coordinates(rank), CPU) for rank in range(mesh.world_size)]


def test_ranks_of_one_tensor_group_share_a_stream_and_no_others_coincide() -> None:
    mesh = Mesh(pp=2, dp=2, cp=2, tp=4, copies=2)
    seeds: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    for seed in (0, 1):
        for rank, each in enumerate(streams(mesh, seed)):
            *group, tp = mesh.coordinates(rank).values()
            for name, place in ((SHARED, ()), (OWN, (tp,)), (SAME_SHARD, (tp // 2,))):
                # The CPU's generator looks at 32 bits of its seed.
                low = getattr(each, name).generator.initial_seed() % 2**32
                seeds.setdefault(low, set()).add((name, (seed, *group, *place)))
    assert all(len(users) == 1 for users in seeds.values())
    assert len(seeds) == 2 * 8 * (1 + 4 + 2)


def test_the_state_can_be_kept_and_what_was_drawn_be_drawn_again() -> None:
    x = torch.ones(50)
    [one] = streams(Mesh())

    def draw() -> list[Tensor]:
        return [getattr(one, name).keep(x, 0.5) for name in NAMES]

    draw()
    state = one.state_dict()
    first, second = draw(), draw()
    with one.replayed(state):
        again = draw()
    third = draw()
    one.load_state_dict(state)
    for expected, got in ((first, again), (first, draw()), (second, draw()), (third, draw())):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*first, *second, *third], 2))
    with pytest.raises(KeyError):
        one.load_state_dict({SHARED: state[SHARED]})


# Models that drop.

DROPS = 0.25
MODELS: dict[str, dict[str, float]] = {
    "gpt_neox": {"hidden_dropout": DROPS, "attention_dropout": DROPS},
    "bloom": {"hidden_dropout": DROPS, "attention_dropout": DROPS},
    "opt": {"dropout": DROPS, "attention_dropout": DROPS},
}


class DroppedKeys(nn.Linear):
    """A projection that drops from its result."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), DROPS, self.training)


class Block(nn.Module):
    """Attention by torch's own function, then by steps, then an MLP; each drops, the MLP inside."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        for fused in (True, False):
            q, k, v = (each(x).unflatten(-1, (4, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
            if fused:
                mixed = functional.scaled_dot_product_attention(q, k, v, None, DROPS, True)
            else:
                mixed = functional.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), DROPS) @ v
            x = x + functional.dropout(self.o(mixed.transpose(1, 2).flatten(2)), DROPS, inplace=True)
        return x + self.down(functional.dropout(functional.silu(self.up(x)), DROPS))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.stack, self.out = nn.Embedding(31, 16), nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 31)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.table(input_ids)
        for block in self.stack:
            x = block(x)
        return {"loss": functional.cross_entropy(self.out(x).flatten(0, 1), labels.flatten())}


TOY = {"table": "vocab", "stack.*.{q,k,v,up}": "colwise", "stack.*.{o,down}": "rowwise", "out": "vocab"}
UNITS = {"table": "first", "stack.*": "layer", "out": "last"}


def model(name: str) -> nn.Module:
    """A model with real weights."""
    torch.manual_seed(0)
    if name == "toy":
        return Toy()
    if name in MODELS:
        return initialize(presets.build(tiny_config(name, **MODELS[name])), 0)
    found = initialize(presets.build(tiny(attention_dropout=DROPS)), 0)
    if name == "llama with dropped keys":
        for layer in found.model.layers:  # type: ignore[attr-defined]
            layer.self_attn.k_proj.__class__ = DroppedKeys
    return found


def lower(name: str, world: int, **options: Any) -> Lowered:
    options = {"precision": "fp64", **options}
    weights, units = (tuple(Entry(parse(key), word) for key, word in table.items()) for table in (TOY, UNITS))
    policy = Policy(name, weights, units, options) if name == "toy" else Policy.load(name.partition(" ")[0], **options)
    return shardcomp.lower(model(name), policy, world, seq=LENGTH)


def part(batch: dict[str, Tensor], sharded: ShardedModel) -> dict[str, Tensor]:
    size, rank = sharded.mesh["dp"].size(), sharded.mesh.get_local_rank("dp")
    return {name: held.chunk(size)[rank] for name, held in batch.items()}


def full(held: Any) -> Tensor:
    return (held.full_tensor() if isinstance(held, DTensor) else held).detach().clone()


BATCH = batches(31, 4, LENGTH, 0)["causal"]


Step = tuple[Tensor, dict[str, Tensor]]


def steps(
    lowered: Lowered, count: int = 1, prepare: Callable[[ShardedModel], None] = lambda _: None, plan: Blueprint | None = None
) -> list[list[Step]]:
    """Loss and gradients of some steps without updates, on every rank."""
    weights = weights_of(lowered)

    def work(rank: int) -> list[Step]:
        sharded = allocate(lowered, weights, plan)
        prepare(sharded)
        found = []
        for _ in range(count):
            loss = sharded.train_step(**part(BATCH, sharded)).loss
            found.append((loss, {name: full(p.grad) for name, p in sharded.named_parameters()}))
            sharded.zero_grad()
        return found

    return run_ranks(lowered.mesh.world_size, work)


# What is drawn on which rank.


class Recorded(Stream):
    """A stream that writes down its masks."""

    def __init__(self, true: Stream, masks: list[Tensor]) -> None:
        self.generator, self.masks = true.generator, masks

    def keep(self, x: Tensor, p: float) -> Tensor:
        self.masks.append(super().keep(x, p))
        return self.masks[-1]


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.long  # each call draws as its layout asks
def test_ranks_draw_the_same_for_what_is_whole_and_otherwise_each_its_own(sequence_parallel: bool) -> None:
    lowered = lower("gpt_neox", 4, tensor=2, sequence_parallel=sequence_parallel)
    masks: dict[int, dict[str, list[Tensor]]] = {}

    def prepare(sharded: ShardedModel) -> None:
        mine = masks[torch.distributed.get_rank()] = {name: [] for name in NAMES}
        for name in NAMES:
            setattr(sharded.random, name, Recorded(getattr(sharded.random, name), mine[name]))

    steps(lowered, 1, prepare)
    assert masks[0][OWN] and (masks[0][SHARED] or sequence_parallel) and not masks[0][SAME_SHARD]
    for name, same in ((SHARED, {(0, 1), (2, 3)}), (OWN, set())):
        for a, b in itertools.combinations(range(4), 2):
            for one, other in zip(masks[a][name], masks[b][name], strict=True):
                assert torch.equal(one, other) == ((a, b) in same), (name, a, b)
    every = [mask.flatten()[:60].tolist() for name in NAMES for mask in masks[0][name]]
    assert all(a != b for a, b in itertools.combinations(every, 2))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again = (steps(lower("gpt_neox", 4, tensor=2), 2) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        for (loss, gradients), (loss_again, gradients_again) in zip(one, two, strict=True):
            assert torch.equal(loss, loss_again)
            assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    assert not torch.equal(first[0][0][0], first[0][1][0])  # the next step drops others
    made = lower("gpt_neox", 4, tensor=2)
    other = steps(made, 1, plan=replace(made.blueprint(), seed=1))
    assert not torch.equal(other[0][0][0], first[0][0][0])


def test_all_ranks_agree_about_the_loss_and_about_every_gradient() -> None:
    first, *others = (run[0] for run in steps(lower("gpt_neox", 4, tensor=2)))
    for loss, gradients in others:
        assert torch.equal(loss, first[0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, first[1][name]), name


def test_the_users_own_random_numbers_are_left_alone_and_evaluation_draws_none() -> None:
    lowered = lower("gpt_neox", 1)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        sharded.train_step(**BATCH)
        assert torch.equal(torch.get_rng_state(), before)
        state = sharded.random.state_dict()
        sharded.eval()
        losses = [sharded(**BATCH).loss for _ in range(2)]
        assert torch.equal(*losses)
        assert all(torch.equal(held, state[name]) for name, held in sharded.random.state_dict().items())
        sharded.train()
        assert not torch.equal(sharded(**BATCH).loss, losses[0])

    run_ranks(1, work)


@pytest.mark.parametrize("tensor", [1, 2])
def test_gradients_are_those_of_the_masks_that_were_drawn(tensor: int) -> None:
    lowered = lower("gpt_neox", tensor, tensor=tensor)

    def work(rank: int) -> None:
        sharded = allocate(lowered, weights_of(lowered))
        state = sharded.random.state_dict()
        sharded.train_step(**BATCH)
        slope, size, draw = 0.0, 1e-6, torch.Generator().manual_seed(0)
        shifts = {}
        for name, p in sharded.named_parameters():
            shifts[name] = torch.randn(p.shape, generator=draw, dtype=p.dtype)
            slope += float((full(p.grad) * shifts[name]).sum())
        losses = []
        for sign in (1, -2):
            for name, p in sharded.named_parameters():
                local, index = p.to_local(), [slice(None)] * p.dim()
                for placement in p.placements:
                    if placement.is_shard():
                        step = -(-p.shape[placement.dim] // tensor)
                        index[placement.dim] = slice(rank * step, rank * step + local.shape[placement.dim])
                with torch.no_grad():
                    local += sign * size * shifts[name][tuple(index)]
            with torch.no_grad(), sharded.random.replayed(state):
                losses.append(float(sharded(**BATCH).loss))
        assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(slope, rel=1e-6)

    run_ranks(tensor, work)


# Own or shared: with masks by the place in the whole value, many ranks must compute what one does.


class Places(Stream):
    """A stream whose masks are those of the whole value, of which a rank takes the part that it has.

    shapes: those of the whole values in the order of the calls, written down by the run on one rank. A stream that is drawn
    from for a value that does not lie as its name says gives masks that no other rank's fit.
    """

    def __init__(self, name: str, shapes: list[torch.Size], sharded: ShardedModel, calls: list[int], writes: bool) -> None:
        super().__init__(0, sharded.device)
        self.name, self.shapes, self.calls, self.writes = name, shapes, calls, writes
        self.dp, self.dp_rank = sharded.mesh["dp"].size(), sharded.mesh.get_local_rank("dp")
        self.tp, self.tp_rank = sharded.mesh["tp"].size(), sharded.mesh.get_local_rank("tp")

    def keep(self, x: Tensor, p: float) -> Tensor:
        call, self.calls[0] = self.calls[0], self.calls[0] + 1
        if self.writes:
            self.shapes.append(x.shape)
        whole = self.shapes[call]
        assert whole[0] == x.shape[0] * self.dp
        cut = [dim for dim in range(1, x.dim()) if whole[dim] != x.shape[dim]]
        pieces = whole[cut[0]] // x.shape[cut[0]] if cut else 1
        drawn_for = {SHARED: 1, OWN: self.tp, SAME_SHARD: pieces if 1 < pieces < self.tp else -1}[self.name]
        fits = drawn_for == pieces
        draw = torch.Generator().manual_seed(1000 * call + (0 if fits else 1 + self.tp_rank * (self.name == OWN)))
        kept = torch.rand(whole, generator=draw) >= p
        kept = kept.chunk(self.dp, 0)[self.dp_rank]
        return kept.chunk(pieces, cut[0])[self.tp_rank * pieces // self.tp] if cut else kept


def by_place(shapes: list[torch.Size], writes: bool = False) -> Callable[[ShardedModel], None]:
    def prepare(sharded: ShardedModel) -> None:
        calls = [0]
        for name in NAMES:
            setattr(sharded.random, name, Places(name, shapes, sharded, calls, writes))

    return prepare


def deviation(got: Step, expected: Step) -> float:
    """The largest of the loss and the gradients, each relative to its own norm or a small part of that of all."""
    floor = 1e-6 * float(torch.cat([g.flatten() for g in expected[1].values()]).norm())
    pairs = [(got[0], expected[0], 0.0), *((got[1][name], g, floor) for name, g in expected[1].items())]
    return max(float((a - b).norm()) / max(float(b.norm()), least) for a, b, least in pairs)


CASES = [
    *((name, 2, 4, flag) for name in ("llama", "toy") for flag in (True, False)),
    *((name, 2, 4, i % 2 == 0) for i, name in enumerate(MODELS)),
    ("llama with dropped keys", 4, 4, True),
    ("llama with dropped keys", 4, 8, False),
]


@pytest.mark.parametrize(("name", "tensor", "world", "sequence_parallel"), CASES)
def test_each_call_draws_from_the_stream_that_its_layout_asks_for(
    name: str, tensor: int, world: int, sequence_parallel: bool
) -> None:
    shapes: list[torch.Size] = []
    expected = steps(lower(name, 1), 1, by_place(shapes, writes=True))[0][0]
    lowered = lower(name, world, tensor=tensor, sequence_parallel=sequence_parallel)
    for [got] in steps(lowered, 1, by_place(shapes)):
        assert deviation(got, expected) < 1e-9
    source = lowered.blueprint().sources[0]
    used = list(re.finditer(r"random=self\.random\.(\w+)", source))
    assert name != "toy" or {match[1] for match in used} == ({OWN} if sequence_parallel else {OWN, SHARED})
    assert any(match[1] == SAME_SHARD for match in used) == (name == "llama with dropped keys")
    for match in used if name in ("llama", "toy", "llama with dropped keys") else ():
        for other in {SHARED, OWN} - {match[1]}:
            faulty = source[: match.start(1)] + other + source[match.end(1) :]
            wrong = steps(lowered, 1, by_place(shapes), replace(lowered.blueprint(), sources=(faulty,)))[0][0]
            assert deviation(wrong, expected) > 1e-6, (match[0], other)
