"""What is compared between a plan and the dense model, with which tolerance, and how far apart the two are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from shardcomp.errors import VerifyError
from shardcomp.ir.precision import COMPUTE
from shardcomp.verification.dense_model import OWN_LOSS, DifferingCopies, Outcome

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}
"""The largest relative deviation that passes, by precision. bf16 and fp16 have `ROUGH_FACTOR` instead."""
ROUGH_FACTOR = 1.5
"""A plan of 16 bits may be this many times as far from float64 as the dense model in the same dtype is."""
FLOOR = 1e-6
"""A gradient's deviation is relative to its own norm, or to this share of the norm of all gradients if that is larger."""


class Worst(TypedDict, total=False):
    """The quantity that is nearest to its tolerance, or furthest beyond it. Empty where nothing was compared."""

    quantity: str
    """loss, logits, gradients, norm or weights"""
    parameter: str
    """The parameter, or the kind of batch where the quantity is one number of it."""
    value: float
    """The relative deviation. Infinite where a number is not finite."""
    tolerance: float


class ComparedCopy(TypedDict):
    """One version of a value that ranks disagree about."""

    ranks: list[int]
    """The ranks that have it."""
    stage: int | None
    """The stage, where two stages of one rank have different versions; else None."""
    deviation: float
    """Its relative deviation from the dense model."""


class Disagreement(TypedDict):
    """A value that ranks should have the same bits of, and do not."""

    quantity: str
    """loss, gradients or weights"""
    parameter: str
    """Its name. Empty for a loss."""
    batch: str
    """The kind of batch. Empty for weights, which are those after the optimizer steps."""
    apart: float
    """The largest distance of a version from the first one, relative to the larger of the two."""
    copies: list[ComparedCopy]
    """Its versions, the first with the lowest rank."""


@dataclass
class Deviations:
    """How far a plan is from the dense model: the largest deviation of each quantity, the worst of all, and disagreements."""

    largest: dict[str, float] = field(default_factory=dict)
    worst: Worst = field(default_factory=Worst)
    ok: bool = True
    disagreements: list[Disagreement] = field(default_factory=list)
    """The furthest apart comes first."""

    def add(self, quantity: str, parameter: str, value: float, tolerance: float) -> None:
        value = finite(value)
        self.largest[quantity] = max(self.largest.get(quantity, 0.0), value)
        self.ok = self.ok and value <= tolerance
        if not self.worst or value / tolerance > self.worst["value"] / self.worst["tolerance"]:
            self.worst = {"quantity": quantity, "parameter": parameter, "value": value, "tolerance": tolerance}


def compare(plan: Outcome, exact: Outcome, rough: Outcome | None, precision: str) -> Deviations:
    """Compare a plan with the dense model.

    Args:
        plan: what the plan computed, assembled from all ranks.
        exact: what the dense model computed: in the plan's own precision, or in float64 where that has 16 bits.
        rough: what the dense model computed in the same 16 bits; None for fp32 and fp64.
        precision: the plan's.

    Raises:
        VerifyError: the plan has gradients of parameters that have none in the dense model.
    """
    deviations = Deviations()
    if rough is not None:
        _compare_rough(deviations, plan, exact, rough, COMPUTE[precision])
        _compare_copies(deviations, plan, exact, tolerance=None)
    else:
        _compare_closely(deviations, plan, exact, TOLERANCE[precision])
        _compare_copies(deviations, plan, exact, TOLERANCE[precision])
    return deviations


def _compare_closely(deviations: Deviations, plan: Outcome, exact: Outcome, tolerance: float) -> None:
    """In float32 and float64, every quantity and every parameter's gradient is within the tolerance."""
    for kind, loss in plan.loss.items():
        deviations.add("loss", kind, relative(loss, exact.loss[kind]), tolerance)
        deviations.add("norm", kind, relative(plan.norm[kind], exact.norm[kind]), tolerance)
        _compare_gradients(deviations, plan.gradients[kind], exact.gradients[kind], float(exact.norm[kind]), tolerance)
        extra = plan.gradients[kind].keys() - exact.gradients[kind].keys()
        if extra:
            raise VerifyError(f"gradients for parameters that have none in the dense model: {', '.join(sorted(extra))}")
    if plan.own_gradients:
        norm = math.hypot(*(float(gradient.norm()) for gradient in exact.own_gradients.values()))
        _compare_gradients(deviations, plan.own_gradients, exact.own_gradients, norm, tolerance)
    if plan.logits is not None and exact.logits is not None:
        deviations.add("logits", "", relative(plan.logits, exact.logits), tolerance)
    for name, weight in plan.weights.items():
        # A gradient that is zero but for rounding becomes a step of full size in AdamW, which divides by its size.
        gradient = exact.gradients["causal"].get(name)
        if gradient is not None and float(gradient.norm()) > FLOOR * float(exact.norm["causal"]):
            deviations.add("weights", name, relative(weight, exact.weights[name]), tolerance)


def _compare_copies(deviations: Deviations, plan: Outcome, exact: Outcome, tolerance: float | None) -> None:
    """Compare every copy of the values that ranks disagree about, with each other and with the dense model.

    `tolerance`: of one value. None in 16 bits, where there is none for a single gradient.
    """
    for differing in plan.disagreements:
        reference, floor = _dense_value(exact, differing)
        copies: list[ComparedCopy] = []
        for copy in differing.copies:
            # A gradient that the dense model does not have counts as zero there.
            deviation = relative(copy.tensor, torch.zeros_like(copy.tensor) if reference is None else reference, floor)
            copies.append({"ranks": copy.ranks, "stage": copy.stage, "deviation": finite(deviation)})
            if tolerance is not None and differing.quantity != "weights":
                deviations.add(differing.quantity, differing.parameter or differing.kind, deviation, tolerance)
        first, *others = (copy.tensor for copy in differing.copies)
        apart = max(finite(relative(other, first, float(other.double().norm()))) for other in others)
        deviations.disagreements.append(
            {
                "quantity": differing.quantity,
                "parameter": differing.parameter,
                "batch": differing.kind,
                "apart": apart,
                "copies": copies,
            }
        )
    deviations.disagreements.sort(key=lambda disagreement: -disagreement["apart"])
    deviations.ok = deviations.ok and not plan.disagreements


def _dense_value(exact: Outcome, differing: DifferingCopies) -> tuple[Tensor | None, float]:
    """The dense model's value that copies are compared with, and the smallest norm to relate a deviation to."""
    name, kind = differing.parameter, differing.kind
    if differing.quantity == "loss":
        return exact.loss[kind], 0.0
    if differing.quantity == "weights":
        return exact.weights.get(name), 0.0
    if kind == OWN_LOSS:
        return exact.own_gradients.get(name), FLOOR * math.hypot(*(float(g.norm()) for g in exact.own_gradients.values()))
    return exact.gradients[kind].get(name), FLOOR * float(exact.norm[kind])


def finite(value: float) -> float:
    """A deviation, infinite if it is not a number."""
    return math.inf if math.isnan(value) else value


def _compare_gradients(
    deviations: Deviations, plan: dict[str, Tensor], exact: dict[str, Tensor], norm: float, tolerance: float
) -> None:
    """`norm`: of all gradients together. A gradient that the plan lacks counts as zero."""
    for name, gradient in exact.items():
        other = plan.get(name, torch.zeros_like(gradient))
        deviations.add("gradients", name, relative(other, gradient, FLOOR * norm), tolerance)


def _compare_rough(deviations: Deviations, plan: Outcome, exact: Outcome, rough: Outcome, dtype: torch.dtype) -> None:
    """In 16 bits, each quantity may be `ROUGH_FACTOR` times as far from float64 as the dense model in the same dtype is."""

    def all_gradients(outcome: Outcome, kind: str) -> Tensor:
        return torch.cat([outcome.gradients[kind][name].flatten().double() for name in exact.gradients[kind]])

    def all_losses(outcome: Outcome) -> Tensor:
        return torch.stack([outcome.loss[kind].double() for kind in plan.loss])

    for kind in plan.loss:
        of_plan, of_dense = (relative(all_gradients(o, kind), all_gradients(exact, kind)) for o in (plan, rough))
        deviations.add("gradients", kind, of_plan, ROUGH_FACTOR * of_dense)
    of_plan, of_dense = (relative(all_losses(o), all_losses(exact)) for o in (plan, rough))
    # A loss is one number, to which the dense model may be close by luck. The dtype's own rounding always passes.
    rounding = float(torch.finfo(dtype).eps) / 2
    deviations.add("loss", "", of_plan, max(ROUGH_FACTOR * of_dense, rounding))
    if plan.logits is not None and exact.logits is not None and rough.logits is not None:
        of_plan, of_dense = (relative(logits, exact.logits) for logits in (plan.logits, rough.logits))
        deviations.add("logits", "", of_plan, ROUGH_FACTOR * of_dense)


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """‖a − b‖ / max(‖b‖, floor), in float64."""
    difference = float((a.double() - b.double()).norm())
    return 0.0 if difference == 0.0 else difference / max(float(b.double().norm()), floor, 1e-300)
