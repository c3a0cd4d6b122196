"""A stage of the model under torch's pipeline schedules, and the schedules that run it.

torch.distributed.pipelining decides the order of forwards, backwards and messages. What a stage does in each is decided here.
torch's own stage loses gradients where FSDP reshards parameters under a split backward. It also runs the model once more to
learn shapes that are known here, and drops accumulated gradients when it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.fsdp import prepare_backward, run_post_backward
from shardcomp.runtime.recompute import split_backward
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.runtime.unit import Stage
from shardcomp.runtime.weight_pass import gradients_of_weights, starts_at_freed_nodes
from shardcomp.torch_private import skip_metadata_inference, stage_backward, stage_backward_input

_CLASSES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}

Batch = Mapping[str, Tensor]


class ModelStage(PipelineStage):
    """One stage of the model on this rank, for one call signature.

    Some schedules want more micro-batches than there are. Those from number `count` on are empty, and cost nothing.

    A micro-batch passes through these dictionaries, all by its number: `_arrived` (inputs from the stage before), `_live`
    (outputs and inputs, for the backward), `_gradients` (of its outputs, from the next stage), `_returned` (of its inputs, for
    the stage before), `_weight_passes` (the second half of its backward).
    """

    def __init__(
        self,
        stage_shard: StageShard,
        code: Stage,
        stages: int,
        placement: Mapping[int, int],
        zero: int,
        group: Any,
        device: torch.device,
    ) -> None:
        super().__init__(nn.Module(), stage_shard.index, stages, device, group=group)
        self.stage_shard, self.code, self.zero = stage_shard, code, zero
        self.stage_index_to_group_rank = dict(placement)
        self._reads = tuple(inspect.signature(code.forward).parameters)
        self.begin([], 1.0)

    def begin(self, batches: Sequence[Batch], scale: float) -> None:
        """Take the micro-batches of a step. scale: the loss scale, which the backward starts from."""
        self.batches, self.scale = batches, scale
        self.count, self.backwards = len(batches), 0
        self.results: dict[int, dict[str, Tensor]] = {}
        self._arrived: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._live: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._returned: dict[int, list[Tensor | None]] = {}
        self._weight_passes: dict[int, Any] = {}

    # -- messages --------------------------------------------------------------------------------------------------------

    def _shapes(self, which: Any, index: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        rows, length = next(iter(self.batches[index].values())).shape[:2]
        return list(which(rows, length))

    def _receive(self, specs: Any, stage: int) -> tuple[list[Tensor], list[dist.P2POp]]:
        buffers = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in specs]
        return buffers, [self._operation(dist.irecv, buffer, stage) for buffer in buffers]

    def _operation(self, kind: Any, tensor: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group_peer=self.stage_index_to_group_rank[stage], group=self.group)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first or fwd_chunk_id >= self.count:
            return []
        specs = [(shape, dtype) for shape, dtype, _ in self._shapes(self.code.received, fwd_chunk_id)]
        self._arrived[fwd_chunk_id], operations = self._receive(specs, self.stage_index - 1)
        return operations

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or fwd_chunk_id >= self.count:
            return []
        outputs = self._live[fwd_chunk_id][0]
        return [self._operation(dist.isend, x.detach().contiguous(), self.stage_index + 1) for x in outputs]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or bwd_chunk_id >= self.count:
            return []
        shapes = self._shapes(self.code.sent, bwd_chunk_id)
        buffers, operations = self._receive([spec[:2] for spec in shapes if spec[2]], self.stage_index + 1)
        arriving = iter(buffers)
        self._gradients[bwd_chunk_id] = [next(arriving) if requires_grad else None for *_, requires_grad in shapes]
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first or bwd_chunk_id >= self.count:
            return []
        returned = self._returned.pop(bwd_chunk_id)
        return [self._operation(dist.isend, g.contiguous(), self.stage_index - 1) for g in returned if g is not None]

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take the outputs of the stage before, which is on this rank too."""
        if mb_index < self.count:
            self._arrived[mb_index] = [x.detach() for x in prev_stage_outputs]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients from the next stage, which is on this rank too."""
        if mb_index < self.count:
            self._gradients[mb_index] = list(next_stage_bwd_outputs)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return tuple(self._returned.pop(mb_index)) if mb_index < self.count else ()

    # -- computing -------------------------------------------------------------------------------------------------------

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any = (), kwargs: Any = None, save_forward_output: bool = True
    ) -> tuple[Tensor, ...]:
        """Forward of one micro-batch. Returns what the next stage takes; the last stage puts its results in `results`."""
        if fwd_chunk_id >= self.count:
            return ()
        inputs: list[Tensor] = []
        if not self.is_first:
            training = torch.is_grad_enabled()
            graded = [requires_grad for *_, requires_grad in self._shapes(self.code.received, fwd_chunk_id)]
            arrived = self._arrived.pop(fwd_chunk_id)
            inputs = [x.requires_grad_(training and grad) for x, grad in zip(arrived, graded, strict=True)]
        batch = {name: tensor for name, tensor in self.batches[fwd_chunk_id].items() if name in self._reads}
        results = self.stage_shard.root(self.code.forward, *inputs, **batch)
        if self.is_last:
            self.results[fwd_chunk_id] = {name: tensor.detach() for name, tensor in results.items()}
            outputs = [results["loss"]] if "loss" in results else []
        else:
            # An input that only passes through gets a node of its own. Otherwise the gradient of the output would be the
            # gradient of the input at once, without what this stage adds to it.
            outputs = [y.view_as(y) if any(y is x for x in inputs) else y for y in results]
        self._live[fwd_chunk_id] = outputs, inputs
        return () if self.is_last else tuple(outputs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """The gradients of the inputs, and where `full_backward` or the plan says so, of the weights too.

        In a split backward, where no input requires a gradient, as in the first stage, the whole backward runs in the weight
        pass.
        """
        if bwd_chunk_id >= self.count:
            return
        outputs, inputs = self._live.pop(bwd_chunk_id)
        if self.is_last:
            gradients: list[Tensor | None] = [torch.full_like(outputs[0], self.scale)]
        else:
            gradients = self._gradients.pop(bwd_chunk_id)
        if full_backward or self.stage_shard.whole_backward:
            self._returned[bwd_chunk_id] = self._full_backward(outputs, gradients, inputs)
            if not full_backward:
                self._weight_passes[bwd_chunk_id] = lambda: None
        elif not any(x.requires_grad for x in inputs):
            self._returned[bwd_chunk_id] = [None] * len(inputs)
            self._weight_passes[bwd_chunk_id] = lambda: self._full_backward(outputs, gradients, inputs)
        else:
            # torch's stage passes the sharded DTensors here, which are not in the graph: their gradients would be lost.
            self._prepare_backward(reduce=False)
            weights = self._gathered()
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
            graded = [x for x in inputs if x.requires_grad]
            # The weight pass starts at nodes of this graph. In torch 2.11 they must not be freed: views keep the graph alive.
            keep_alive = [] if starts_at_freed_nodes() else [o.view_as(o) for o, _ in pairs]
            with split_backward():
                of_inputs, groups = stage_backward_input([o for o, _ in pairs], [g for _, g in pairs], graded, iter(weights))
            returned = iter(of_inputs)
            self._returned[bwd_chunk_id] = _or_zeros([next(returned) if i.requires_grad else None for i in inputs], inputs)
            self._weight_passes[bwd_chunk_id] = lambda keep_alive=keep_alive: self._weights_only(weights, groups)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The gradients of the weights, some time after the gradients of the inputs."""
        if bwd_chunk_id < self.count:
            self._weight_passes.pop(bwd_chunk_id)()

    def _full_backward(
        self, outputs: list[Tensor], gradients: list[Tensor | None], inputs: list[Tensor]
    ) -> list[Tensor | None]:
        self.backwards += 1
        self._prepare_backward(reduce=self.zero >= 2 or self.backwards == self.count)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        gradients = stage_backward(tuple(o for o, _ in pairs), tuple(g for _, g in pairs), inputs)
        return _or_zeros(list(gradients), inputs)

    def _weights_only(self, weights: list[Tensor], groups: Any) -> None:
        self.backwards += 1
        gradients_of_weights(weights, groups)
        self._reduce(self.zero >= 2 or self.backwards == self.count)

    # -- FSDP ------------------------------------------------------------------------------------------------------------

    def _prepare_backward(self, reduce: bool) -> None:
        """Set what FSDP does in the next backward."""
        prepare_backward(self.stage_shard, reduce, last=self.backwards == self.count)

    def _gathered(self) -> list[Tensor]:
        """The parameters as the forward used them: the leaves of its graph, a shared one once."""
        leaves = {id(p): p for unit in self.stage_shard.unit_parameters for p in unit.gathered if p.requires_grad}
        return list(leaves.values())

    def _reduce(self, reduce: bool) -> None:
        """Let FSDP accumulate the gradients of a weight pass, which it did not see, and reduce them over dp where `reduce`."""
        self._prepare_backward(reduce)
        run_post_backward(self.stage_shard)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: the last backward of the step has reduced them already."""

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Nothing: the loss is divided by the labels of the global batch."""

    def clear_runtime_states(self) -> None:
        """Nothing: `begin` does it."""


def _or_zeros(gradients: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """A gradient for every input that requires one, zeros if there is none: the stage before waits for it."""
    return [
        (torch.zeros_like(x) if gradient is None else gradient) if x.requires_grad else None
        for gradient, x in zip(gradients, inputs, strict=True)
    ]


class Pipeline:
    """The stages of this rank under one schedule, for one call signature."""

    def __init__(self, stages: list[ModelStage], schedule: str, pipeline: int) -> None:
        self.stages = stages
        self._name, self._pipeline = schedule, pipeline
        self._schedules: dict[int, Any] = {}

    def train(self, batches: Sequence[Batch], scale: float) -> list[dict[str, Tensor]]:
        """Forward and backward of all micro-batches. Returns the results of each, if this rank has the last stage."""
        self._begin(batches, scale)
        slots = least_slots(self._name, len(batches), self._pipeline, self.stages[0].num_stages)
        if slots not in self._schedules:
            self._schedules[slots] = self._schedule(slots)
        target = {"target": torch.zeros(slots)} if any(stage.is_last for stage in self.stages) else {}
        self._schedules[slots].step(return_outputs=False, **target)
        return self._results(len(batches))

    def evaluate(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Forward of all micro-batches, without gradients."""
        self._begin(batches, 1.0)
        works: list[Any] = []
        # Every rank sorts its stages and micro-batches by this sum, so whatever it waits for was sent earlier.
        turns = sorted((index + stage.stage_index, stage.stage_index) for stage in self.stages for index in range(len(batches)))
        by_index = {stage.stage_index: stage for stage in self.stages}
        with torch.no_grad():
            for total, position in turns:
                stage, index = by_index[position], total - position
                if position - 1 not in by_index:
                    for work in _start(stage.get_fwd_recv_ops(index)):
                        work.wait()
                outputs = stage.forward_one_chunk(index)
                if position + 1 in by_index:
                    by_index[position + 1].set_local_fwd_input(outputs, index)
                else:
                    works += _start(stage.get_fwd_send_ops(index))
                stage._live.pop(index)
        for work in works:
            work.wait()
        return self._results(len(batches))

    def _begin(self, batches: Sequence[Batch], scale: float) -> None:
        for stage in self.stages:
            stage.begin(batches, scale)

    def _results(self, count: int) -> list[dict[str, Tensor]]:
        last = next((stage for stage in self.stages if stage.is_last), None)
        results = [last.results[index] for index in range(count)] if last else []
        self._begin([], 1.0)
        return results

    def _schedule(self, slots: int) -> Any:
        stages: Any = self.stages if self._name not in ("gpipe", "1f1b") else self.stages[0]
        schedule = _CLASSES[self._name](stages, slots, loss_fn=lambda output, target: output, scale_grads=False)
        skip_metadata_inference(schedule)
        return schedule


def _start(operations: list[dist.P2POp]) -> list[Any]:
    return dist.batch_isend_irecv(operations) if operations else []


def least_slots(schedule: str, micro_batches: int, pipeline: int, stages: int) -> int:
    """The smallest number of micro-batches, at least `micro_batches`, that a schedule takes."""
    if schedule == "1f1b":
        return max(micro_batches, pipeline)
    if schedule == "dualpipev":
        return max(micro_batches, stages)
    if SCHEDULES[schedule].interleaves:
        slots = micro_batches
        while slots % max(1, slots // pipeline):
            slots += 1
        return slots
    return micro_batches
