"""A call of the model as a plain module: `sharded(...)`, and whatever backward starts from its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis, allreduce_identity
from shardcomp.runtime.agreed_calls import EXCHANGED, AgreedCalls
from shardcomp.runtime.agreement import Agreed, Agreement
from shardcomp.runtime.backward import BackwardPasses, around_backward
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.call_cache import LoadedCall
from shardcomp.runtime.fsdp import prepare_backward, reshard
from shardcomp.runtime.gradients import local
from shardcomp.runtime.guard import CallGuard
from shardcomp.runtime.outputs import as_output, computed_of, output_type
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.runtime.steps import Steps

CALL = "sharded(...)"
"""The name of such a call in messages."""


class DirectCalls:
    """Runs the calls of one model that has no pipeline. named: its parameters, as `fsdp.named_parameters` gives them.
    scale: the loss scale."""

    def __init__(
        self,
        blueprint: Blueprint,
        stage_shards: Sequence[StageShard],
        mesh: DeviceMesh,
        axes: Mapping[str, Axis],
        device: torch.device,
        named: Sequence[tuple[str, Any]],
        calls: AgreedCalls,
        agreement: Agreement,
        passes: BackwardPasses,
        guard: CallGuard,
        steps: Steps,
        scale: Callable[[], float],
    ) -> None:
        self._blueprint, self._stage_shards, self._mesh, self._axes = blueprint, stage_shards, mesh, axes
        self._device, self._named, self._calls, self._agreement = device, named, calls, agreement
        self._passes, self._guard, self._steps, self._scale = passes, guard, steps, scale

    def run(self, batch: dict[str, Tensor], num_items_in_batch: Tensor | int | None, return_logits: bool | str) -> Any:
        """The model's own output of a batch."""
        outputs = self._outputs_of(batch, bool(return_logits))
        counts = "loss" in outputs and num_items_in_batch is None
        # Without a loss nothing connects the data-parallel ranks: one of them may evaluate alone.
        axes = EXCHANGED if "loss" in outputs else ("tp",)
        code, agreed = self._calls.agree(CALL, [batch], outputs, axes, counts)
        inputs = dict(batch)
        if "loss" in outputs:
            inputs["num_items_in_batch"] = torch.as_tensor(
                agreed.tokens if num_items_in_batch is None else num_items_in_batch, device=self._device
            )
        [stage_shard] = self._stage_shards
        prepare_backward(stage_shard, reduce=True, last=True)
        with self._guard.restoring():
            results = stage_shard.root(code.stages[0].forward, **inputs)
        if not torch.is_grad_enabled():  # no backward will reshard
            reshard(stage_shard)
        differentiable = [name for name, tensor in results.items() if tensor.requires_grad]
        if differentiable:
            self._watch(results, differentiable, code, agreed)
        for name, tensor in results.items():
            if name != "loss":
                split = code.blueprint.output_split.get(name)
                results[name] = as_output(tensor, self._mesh, split, return_logits == "whole")
        if "loss" in results:
            results["loss"] = computed_of(allreduce_identity(results["loss"], self._axes["dp"]), results.get("logits"))
        return output_type(code.blueprint.output_type)(**results)

    def _watch(self, results: dict[str, Tensor], names: list[str], code: LoadedCall, agreed: Agreed) -> None:
        """Replace outputs by ones whose backward, wherever it starts, begins and ends a pass of `BackwardPasses`."""
        # The closures below must not refer to `results`: the outputs would keep each other alive.
        versions, exchanged = self._versions(), "loss" in results
        late: list[Tensor] = []  # answers of an exchange that are still on the device

        def begin(number: int) -> tuple[bool, float]:
            if self._versions() != versions:
                raise PlanError(
                    "weights were changed between a call and its backward, whose gradients would be of neither: call "
                    ".backward() before the optimizer steps, or call the model again"
                )
            first = self._passes.begin(code, number)
            if first and not exchanged:  # the ranks of dp compared nothing in the forward, and will now sum gradients
                digest, _ = self._calls.trained.look()
                tokens = torch.zeros_like(agreed.tokens)
                answer = self._agreement.exchange("a backward", {}, {}, ("dp",), tokens, trained=digest)
                late[:] = [] if answer.bad is None else [answer.bad]
            return first, self._scale()

        def end() -> None:
            bad = self._passes.end()
            bad = sum(late, bad if agreed.bad is None else bad + agreed.bad)
            self._steps.note(self._steps.sum_over_ranks([], bad)[1])

        outputs = [results[name] for name in names]
        results.update(zip(names, around_backward(outputs, begin, end), strict=True))

    def _versions(self) -> list[tuple[int, int]]:
        """How often each parameter was written to: the DTensor, and its local tensor."""
        with torch.no_grad():  # `to_local` then returns the tensor itself, not a view with a version of its own
            return [(p._version, local(p)._version) for p in (entry.sharded_param for _, entry in self._named)]

    def _outputs_of(self, batch: Mapping[str, Tensor], with_logits: bool) -> tuple[str, ...]:
        """What a call returns: what the first call did where it has the same inputs, else the loss or the logits."""
        first = self._blueprint
        if sorted(batch) == sorted(first.inputs) and first.outputs != ("loss",):
            outputs = first.outputs
        elif "labels" in batch:
            outputs = ("loss",)
        else:
            outputs = tuple(name for name in first.outputs if name != "loss") or ("logits",)
        return outputs if not with_logits or "logits" in outputs else (*outputs, "logits")
