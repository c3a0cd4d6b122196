"""Drawn structures × sizes × topologies: what a model is made of does not matter. A legal plan agrees with the dense model and
every fault planted in it is noticed; an illegal one is refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

import shardcomp
from shardcomp import ShardError
from shardcomp.errors import InternalError
from support.selection import LONG, PARTS
from support.structures import CHOICES, Sizes, Structure, build, policy

KINDS = [("causal",)] * 4 + [("padded",), ("packed",)]
FAULTS = ("heads", "kv", "intermediate", "vocabulary")


@dataclass(frozen=True)
class Plan:
    """A model and how it is to run. `fault`: the size that does not divide, None where all do. `mutate`: whether faults are
    planted in it."""

    structure: Structure
    sizes: Sizes
    tensor: int
    data: int
    sequence_parallel: bool
    micro_batch: int
    fault: str | None = None
    mutate: bool = False

    def policy(self) -> shardcomp.Policy:
        return policy(
            self.structure,
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            micro_batch=self.micro_batch,
            precision="fp64",
        )

    @property
    def world(self) -> int:
        return self.tensor * self.data


def per_head(structure: Structure) -> bool:
    """Whether q, k and v of one head lie together, so that there are as many of each."""
    return structure.projections.startswith("heads")


@st.composite
def heads(draw: st.DrawFn, structure: Structure, tensor: int) -> tuple[int, int, int]:
    """Heads, key-value heads and the features of each, that fit `tensor`."""
    features = draw(st.sampled_from([4, 6, 8]))
    if not per_head(structure):
        copied = [kv for kv in range(1, tensor) if tensor % kv == 0]
        if copied and draw(st.booleans()):
            return tensor * draw(st.integers(1, 2)), draw(st.sampled_from(copied)), features
    kv = tensor * draw(st.integers(1, 2 if tensor > 1 else 3))
    return kv * (1 if per_head(structure) else draw(st.integers(1, 3 if tensor < 3 else 2))), kv, features


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Six draws in ten fit their degree, by construction; the others have one size that does not."""
    structure = Structure(**{name: draw(st.sampled_from(values)) for name, values in CHOICES.items()})
    if draw(st.booleans()):  # what a model writes out itself is captured twice, so it is drawn less often
        structure = replace(structure, attention="interface")
    fault = draw(st.sampled_from([None] * 6 + list(FAULTS)))
    mutate = fault is None and draw(st.sampled_from([False] * 4 + [True]))
    tensor = 2 if mutate else draw(st.sampled_from([2, 3, 4, 1]))  # each planted fault is a run of its own
    n, kv, features = draw(heads(structure, tensor))
    sizes = Sizes(
        hidden=draw(st.integers(16, 32)),
        layers=1 if mutate else 2 if structure.mask == "alternating" else draw(st.sampled_from([1, 1, 2])),
        heads=n,
        kv=kv,
        head_dim=features,
        intermediate=tensor * draw(st.integers(4, 10)),
        vocabulary=draw(st.integers(11, 60)),
    )
    data, micro_batch = (1, 1) if mutate else (draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2])))
    plan = Plan(structure, sizes, tensor, data, draw(st.booleans()), micro_batch, mutate=mutate)
    return plan if fault is None or tensor == 1 else draw(spoilt(plan, fault))


@st.composite
def spoilt(draw: st.DrawFn, plan: Plan, fault: str) -> Plan:
    """The same plan with a size that does not fit its degree."""
    tensor, sizes, made = plan.tensor, plan.sizes, plan.structure
    if fault == "vocabulary" and tensor == 2 or fault == "kv" and per_head(made):
        fault = "heads"  # two ranks share any vocabulary, and a head that lies together has one of each
    if fault == "kv":
        kv, n = draw(st.sampled_from({2: [(3, 6)], 3: [(2, 6), (4, 12)], 4: [(3, 12), (6, 12)]}[tensor]))
        wrong = replace(sizes, heads=n, kv=kv)
    elif fault == "intermediate":
        wrong = replace(sizes, intermediate=sizes.intermediate + draw(st.integers(1, tensor - 1)))
    elif fault == "vocabulary":
        wrong = replace(sizes, vocabulary=draw(st.sampled_from({3: [2, 4], 4: [3, 5, 6, 9]}[tensor])))
    else:
        n = draw(st.sampled_from([n for n in range(2, 10) if n % tensor]))
        wrong = replace(sizes, heads=n, kv=n)
    return replace(plan, sizes=wrong, fault=fault)


SHARED_BY_ALL_KEYS = Structure(norm="layer_biased", qk_norm="head", positions="none")


def test_a_gradient_that_is_zero_cannot_be_falsified() -> None:
    plan = Plan(SHARED_BY_ALL_KEYS, Sizes(layers=1, heads=4, kv=4, intermediate=12), 2, 1, False, 1)
    found = shardcomp.verify(build(plan.structure, plan.sizes), plan.policy(), 2, kinds=("causal",), mutate=True)
    assert found.ok, found


def refused(plan: Plan) -> bool:
    """Whether a plan is refused before anything runs."""
    try:
        shardcomp.lower(build(plan.structure, plan.sizes), plan.policy(), plan.world, seq=12)
    except ShardError as error:
        return not isinstance(error, InternalError)  # which would be the compiler's own fault, not the plan's
    return False


@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=160 // PARTS if LONG else 2)
@given(plan=plans(), kinds=st.sampled_from(KINDS))
def test_a_legal_plan_agrees_whatever_the_structure_and_an_illegal_one_is_refused(
    plan: Plan, kinds: tuple[str, ...], part: int
) -> None:
    event(f"illegal: {plan.fault}" if plan.fault else "legal, with faults planted" if plan.mutate else "legal")
    note(f"{plan.structure}")
    if plan.fault:
        assert refused(plan), "a plan that cannot work was lowered"
        return
    model = build(plan.structure, plan.sizes)
    found = shardcomp.verify(model, plan.policy(), plan.world, kinds=kinds, mutate=plan.mutate)
    assert found.ok, found


ROWS = max(len(values) for values in CHOICES.values())


def row(number: int) -> Structure:
    """One of `ROWS` structures which together have every value of every choice."""
    return Structure(**{name: values[(number + i) % len(values)] for i, (name, values) in enumerate(CHOICES.items())})


@pytest.mark.parametrize("number", range(ROWS))
def test_every_value_of_every_choice_agrees(number: int) -> None:
    structure, tensor = row(number), (2, 3, 4)[number % 3]
    sizes = Sizes(
        layers=2 if structure.mask == "alternating" else 1,
        heads=2 * tensor,
        kv=2 * tensor if per_head(structure) else tensor,
        intermediate=6 * tensor,
    )
    plan = Plan(structure, sizes, tensor, 1, number % 2 == 0, 1)
    found = shardcomp.verify(build(structure, sizes), plan.policy(), plan.world, kinds=("causal",))
    assert found.ok, found


def test_the_covering_structures_hold_every_value() -> None:
    for name, values in CHOICES.items():
        assert {getattr(row(number), name) for number in range(ROWS)} == set(values)


@pytest.mark.parametrize("number", range(ROWS))
def test_auto_splits_as_much_as_the_policy_and_sends_no_more(number: int) -> None:
    structure = row(number)
    sizes = Sizes(layers=2, heads=4, kv=4 if per_head(structure) else 2, intermediate=12)
    plan = Plan(structure, sizes, 2, 1, number % 2 == 1, 1)
    auto = shardcomp.Policy.load("auto", **plan.policy().asked)
    mine, found = (shardcomp.lower(build(structure, sizes), each, 2, seq=12).report() for each in (plan.policy(), auto))
    assert found["memory"]["parameters"] <= mine["memory"]["parameters"]
    assert sum(m["bytes"] for m in found["collectives"]) <= sum(m["bytes"] for m in mine["collectives"])
