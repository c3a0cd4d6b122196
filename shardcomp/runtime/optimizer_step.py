"""One step of any optimizer, skipped where gradients are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.errors import PlanError, ShardError
from shardcomp.runtime.contexts import say_where
from shardcomp.runtime.gradients import coefficient, scale_gradients
from shardcomp.runtime.optimizer import AdamW

Parameters = Callable[[], Iterator[nn.Parameter]]


def step_unless_bad(
    optimizer: torch.optim.Optimizer,
    parameters: Parameters,
    norm: Tensor | None,
    max_norm: float,
    bad: Tensor | None,
    device: torch.device,
) -> bool:
    """Clip and step. Returns whether the step was skipped.

    norm: [], of all gradients, where it is known. bad: [], not zero where a gradient is not finite; None for no backward.
    """
    if norm is not None:
        overflow = (~norm.isfinite()).to(norm.dtype)
        bad = overflow if bad is None else bad + overflow
    if isinstance(optimizer, AdamW):
        # It reads `found_inf` on the device, so the update is queued before `bool(bad)` below waits for anything.
        optimizer.found_inf = torch.zeros((), device=device) if bad is None else bad
        try:
            optimizer.step(norm=norm, max_norm=max_norm)
        finally:
            del optimizer.found_inf
        return bad is not None and bool(bad > 0)
    if bad is not None and bool(bad > 0):
        return True
    if norm is not None and max_norm != math.inf:
        scale_gradients(parameters(), coefficient(norm, max_norm))
    optimizer.step()
    return False


@contextmanager
def checked(optimizer: torch.optim.Optimizer, parameters: Parameters, where: Callable[[], str]) -> Iterator[None]:
    """Refuse an optimizer that reads one shard as the parameter, and say where others failed."""
    if isinstance(optimizer, torch.optim.Adafactor) and any(_is_sharded(p) for p in parameters()):
        raise PlanError(
            f"optimizer_step(Adafactor) on {where()}: torch's Adafactor reads the norms of one shard, and lacks "
            "operators for DTensors; use shardcomp.AdamW, or a plan that splits no parameter: zero = 0 without tensor"
        )
    try:
        yield
    except ShardError:
        raise
    except Exception as error:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        say_where(
            error,
            f"optimizer_step({kind}) failed on {where()}",
            "docs/module_contract.md lists the optimizers that run on DTensors; shardcomp.AdamW asks nothing of them",
        )
        raise


def _is_sharded(parameter: Tensor) -> bool:
    """Whether several ranks have different shards of a parameter."""
    if not isinstance(parameter, DTensor):
        return False
    sizes = parameter.device_mesh.shape
    return any(size > 1 and not at.is_replicate() for size, at in zip(sizes, parameter.placements, strict=True))
