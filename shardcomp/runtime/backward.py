"""What happens around a backward pass, whichever outputs of the model it starts from.

Before the first gradient of a pass, existing gradients are multiplied by the loss scale, as the new ones will be. Those of
parameters whose new gradient is still to be summed over ranks, or shown to hooks, are stashed.

After the last gradient of a pass, the new ones are summed over ranks, unscaled, shown to hooks, added to the stashed ones, and
checked for what is not finite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp.errors import PlanError
from shardcomp.runtime.call_cache import LoadedCall
from shardcomp.runtime.fsdp import finish_unreduced_grads, reset, sharded_parameters
from shardcomp.runtime.gradients import Partial, not_finite, reduce_partial, scale_gradients
from shardcomp.runtime.hooks import ParameterHooks
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.torch_private import NO_GRAPH_TASK, current_graph_task, queue_callback

WHOLE_STEP = -2
"""The number of a pass that covers all micro-batches of a `train_step`. Autograd numbers its own passes from 0."""


class BackwardPasses:
    """The backward passes of a model, one at a time.

    A pass is one run of autograd, which may start from outputs of several calls, or all micro-batches of a `train_step`.
    scale: the loss scale.
    """

    def __init__(
        self, stage_shards: Sequence[StageShard], scale: Callable[[], float], hooks: ParameterHooks, device: torch.device
    ) -> None:
        self._stage_shards, self._scale, self._hooks, self._device = stage_shards, scale, hooks, device
        self._pass: int | None = None
        self._calls: list[LoadedCall] = []
        self._partials: dict[str, Partial] = {}
        self._stashed: dict[nn.Parameter, Tensor | None] = {}

    @property
    def stashed(self) -> list[Tensor]:
        """The gradients that a pass under way has stashed."""
        return [gradient for gradient in self._stashed.values() if gradient is not None]

    def begin(self, call: LoadedCall, number: int = WHOLE_STEP) -> bool:
        """Called before the first gradient of each call that the pass `number` goes through.

        Returns whether this is the first of them. Raises PlanError for two calls whose gradients cannot be summed in one pass.
        """
        if self._pass is not None and self._pass != number:
            self.discard()  # the one before ended in an exception
        first = self._pass is None
        if first:
            self._pass = number
            self._stash(self._hooks.suspend())
        if call not in self._calls:
            for other in self._calls:
                _check_summable(call, other)
            self._calls.append(call)
            self._partials |= {partial.name: partial for partial in call.partials}
            self._stash([p for partial in call.partials for p in partial.copies])
        if first:
            scale_gradients(self._parameters(), self._scale())  # divided by it with the new ones
        return first

    def _stash(self, parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if p not in self._stashed:
                self._stashed[p], p.grad = p.grad, None

    def end(self) -> Tensor:
        """Called after the last gradient of a pass. Returns [], 1 where a gradient on this rank is not finite, else 0."""
        for stage_shard in self._stage_shards:
            finish_unreduced_grads(stage_shard)
        reduce_partial(self._partials.values(), self._device)
        scale_gradients(self._parameters(), 1 / self._scale())
        self._hooks.show_gradients()
        for p, old in self._stashed.items():
            if old is not None:
                p.grad = old if p.grad is None else p.grad + old
        bad = not_finite(self._parameters(), self._device)
        self._finish()
        self._hooks.show_parameters()
        return bad

    def discard(self) -> None:
        """Drop all gradients. Called after an exception: neither half-made nor stashed gradients may add to a later pass."""
        for p in self._parameters():
            p.grad = None
        self._finish()

    def recover(self) -> None:
        """Called before the model is used. Where the caller's backward ended in an exception, start again without
        gradients."""
        if self._pass is None or current_graph_task() != NO_GRAPH_TASK:
            return
        warnings.warn(
            "a backward pass through this model ended in an exception: its gradients, and those before it, are dropped",
            stacklevel=3,
        )
        for stage_shard in self._stage_shards:
            reset(stage_shard, self._device)
        self.discard()

    def _finish(self) -> None:
        self._pass, self._calls, self._partials, self._stashed = None, [], {}, {}
        self._hooks.resume()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for stage_shard in self._stage_shards for p in sharded_parameters(stage_shard))


def _check_summable(call: LoadedCall, other: LoadedCall) -> None:
    """Raise PlanError where one call leaves a gradient partial on axes on which another one does not."""
    here, there = call.blueprint, other.blueprint
    if here.parameters is there.parameters:
        return
    different = [
        name
        for name, plan in here.parameters.items()
        if (other_plan := there.parameters[name]).partial_gradient != plan.partial_gradient
        and not (plan.idle or other_plan.idle)
        and plan.requires_grad
        and other_plan.requires_grad
    ]
    if different:
        shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        raise PlanError(
            f"one backward pass goes through ({', '.join(here.inputs)}) -> ({', '.join(here.outputs)}) and "
            f"({', '.join(there.inputs)}) -> ({', '.join(there.outputs)}), which leave the gradient of {shown} partial on "
            "different axes of the mesh: call .backward() on each of them; gradients add up"
        )


class _Around(torch.autograd.Function):
    """The outputs of a call as one autograd node, whose backward runs `begin` before any other of the call."""

    @staticmethod
    def forward(ctx: Any, begin: Callable[[], float], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.begin = begin
        ctx.set_materialize_grads(False)
        # No views: autograd refuses writing into one in place, as training code does in `logits /= temperature`.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise PlanError(
                "a backward with create_graph = True: gradients of gradients would be wrong, since collectives and kernels "
                "have first derivatives only; leave create_graph out"
            )
        scale = ctx.begin()
        return None, *(g if g is None or scale == 1.0 else g * scale for g in gradients)


def around_backward(
    outputs: Sequence[Tensor], begin: Callable[[int], tuple[bool, float]], end: Callable[[], None]
) -> list[Tensor]:
    """Wrap the outputs of a call, so that every backward pass from them runs `begin` first and `end` last.

    begin: takes the number of the pass. Returns whether this is the first call of the pass, and what gradients are multiplied
        by.
    end: runs once per pass, after FSDP's own last callback.
    """

    def start() -> float:
        first, scale = begin(current_graph_task())
        if first:
            # FSDP queues its own callback after this point, and it must run before `end`. So this callback only queues
            # another one: it runs before FSDP's, and `end` after it.
            queue_callback(lambda: queue_callback(end))
        return scale

    return list(_Around.apply(start, *outputs))
