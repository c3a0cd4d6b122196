"""Training and evaluation steps: all micro-batches of a batch, on any topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shardcomp.ir.collectives import Axis
from shardcomp.runtime.agreed_calls import AgreedCalls
from shardcomp.runtime.backward import BackwardPasses
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.call_cache import LoadedCall
from shardcomp.runtime.fsdp import prepare_backward, reshard
from shardcomp.runtime.guard import CallGuard
from shardcomp.runtime.outputs import as_output
from shardcomp.runtime.stage_shard import StageShard


@dataclass(frozen=True)
class StepResult:
    """The result of a step. Every number is a 0-d tensor, the same on every rank.

    Attributes:
        loss: the mean loss over the labels that count in the global batch, in the masters' dtype.
        tokens: how many labels count, int64.
        skipped: whether a gradient is not finite, so that `optimizer_step` will skip the update, bool.
        logits: [b, s, v] of this data-parallel rank's samples, where they were asked for and this pipeline rank has the last
            stage; else None. A DTensor where tensor parallelism splits the vocabulary.
    """

    loss: Tensor
    tokens: Tensor
    skipped: Tensor
    logits: Any = None


class Steps:
    """Runs the steps of one model. scale: the loss scale.

    bad: how many ranks have had gradients that are not finite, summed over the backwards since the last optimizer step; None
        where there was no backward.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        stage_shards: Sequence[StageShard],
        mesh: DeviceMesh,
        axes: Mapping[str, Axis],
        device: torch.device,
        calls: AgreedCalls,
        passes: BackwardPasses,
        guard: CallGuard,
        scale: Callable[[], float],
    ) -> None:
        self._blueprint, self._stage_shards, self._mesh, self._axes = blueprint, stage_shards, mesh, axes
        self._device, self._calls, self._passes, self._guard, self._scale = device, calls, passes, guard, scale
        self.bad: Tensor | None = None

    def train(self, batch: dict[str, Tensor]) -> StepResult:
        """Forward and backward of all micro-batches."""
        code, agreed, micro_batches = self._calls.micro_batches("train_step", batch, ("loss",))
        self._passes.begin(code)
        scale = self._scale()
        try:
            with self._guard.restoring():
                if code.pipeline is None:
                    losses = [
                        self.backward(code, micro_batch, scale, last=micro_batch is micro_batches[-1])
                        for micro_batch in micro_batches
                    ]
                else:
                    losses = [results["loss"] for results in code.pipeline.train(micro_batches, scale)]
                self._reshard()
                bad = self._passes.end()
                # `agreed.bad` is an answer still on the device: adding it here means the host need not wait for it.
                loss, bad = self.sum_over_ranks(losses, bad if agreed.bad is None else bad + agreed.bad)
        except BaseException:
            self._passes.discard()
            self.bad = None
            raise
        self.note(bad)
        return StepResult(loss, agreed.tokens, bad > 0)

    def evaluate(self, batch: dict[str, Tensor], return_logits: bool | str) -> StepResult:
        """Forward of all micro-batches."""
        outputs = ("loss", "logits") if return_logits else ("loss",)
        code, agreed, micro_batches = self._calls.micro_batches("eval_step", batch, outputs)
        with self._guard.restoring():
            if code.pipeline is None:
                root = self._stage_shards[0].root
                results = [root(code.stages[0].forward, **micro_batch) for micro_batch in micro_batches]
            else:
                results = code.pipeline.evaluate(micro_batches)
        self._reshard()
        loss, bad = self.sum_over_ranks([result["loss"] for result in results], torch.zeros((), device=self._device))
        logits = None
        if return_logits and results:
            rows = next(iter(batch.values())).shape[0]
            logits = torch.cat([result["logits"] for result in results])[:rows]
            logits = as_output(logits, self._mesh, code.blueprint.output_split.get("logits"), return_logits == "whole")
        return StepResult(loss, agreed.tokens, bad > 0, logits)

    def backward(self, code: LoadedCall, micro_batch: Mapping[str, Tensor], scale: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch without a pipeline. Returns its share of the mean loss."""
        [stage_shard] = self._stage_shards
        prepare_backward(stage_shard, reduce=last or self._blueprint.zero >= 2, last=last)
        loss = stage_shard.root(code.stages[0].forward, **micro_batch)["loss"]
        loss.backward(torch.full_like(loss, scale))
        return loss.detach()

    def note(self, bad: Tensor) -> None:
        """Count the ranks whose gradients of one backward are not finite."""
        self.bad = bad if self.bad is None else self.bad + bad

    def sum_over_ranks(self, losses: list[Tensor], bad: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all samples, and the number of ranks with bad gradients: the same on every rank."""
        dtype = MASTER[self._blueprint.precision]
        loss = torch.stack(losses).sum().to(dtype) if losses else torch.zeros((), dtype=dtype, device=self._device)
        both = torch.stack([loss, bad.to(dtype)])
        for axis in ("dp", "pp"):
            both = self._axes[axis].all_reduce(both)
        # The ranks of tp have the same loss already, but different gradients.
        return both[0], self._axes["tp"].all_reduce(both[1])

    def _reshard(self) -> None:
        for stage_shard in self._stage_shards:
            reshard(stage_shard)
