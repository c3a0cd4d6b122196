"""A stage of the model under torch's pipeline schedules, and the schedules that run it.

torch.distributed.pipelining decides the order of forwards, backwards and messages. What a stage does in each of them is decided
here: torch's own stage loses gradients where FSDP puts parameters back in pieces under a split backward, runs the model once
more to learn shapes that are known, and drops accumulated gradients when it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import _get_grad_fn_or_grad_acc, stage_backward, stage_backward_input

from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.allocation import StageShard
from shardcomp.runtime.fsdp import prepare, run_post_backward
from shardcomp.runtime.recompute import split_backward
from shardcomp.runtime.unit import DetachNode, Stage

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

    Micro-batches from `count` on are empty: they stand in a schedule that asks for a certain number, and cost nothing.
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
        self.chunk, self.code, self.zero = stage_shard, code, zero
        self.stage_index_to_group_rank = dict(placement)
        self._reads = tuple(inspect.signature(code.forward).parameters)
        self.begin([], 1.0)

    def begin(self, batches: Sequence[Batch], scale: float) -> None:
        """Take the micro-batches of a step; their losses are multiplied by `scale` on the way back."""
        self.batches, self.scale = batches, scale
        self.count, self.done = len(batches), 0
        self.results: dict[int, dict[str, Tensor]] = {}
        self._arrived: dict[int, list[Tensor]] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}
        self._live: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._returned: dict[int, list[Tensor | None]] = {}
        self._weights: dict[int, Any] = {}

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
        return [self._operation(dist.isend, held.detach().contiguous(), self.stage_index + 1) for held in outputs]

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
        """The stage before is on this rank as well."""
        if mb_index < self.count:
            self._arrived[mb_index] = [held.detach() for held in prev_stage_outputs]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """The stage behind is on this rank as well."""
        if mb_index < self.count:
            self._gradients[mb_index] = list(next_stage_bwd_outputs)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return tuple(self._returned.pop(mb_index)) if mb_index < self.count else ()

    # -- computing -------------------------------------------------------------------------------------------------------

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any = (), kwargs: Any = None, save_forward_output: bool = True
    ) -> tuple[Tensor, ...]:
        """One micro-batch: what the next stage takes, or nothing from the last stage, whose results are kept."""
        if fwd_chunk_id >= self.count:
            return ()
        inputs: list[Tensor] = []
        if not self.is_first:
            training = torch.is_grad_enabled()
            wanted = [requires_grad for *_, requires_grad in self._shapes(self.code.received, fwd_chunk_id)]
            arrived = self._arrived.pop(fwd_chunk_id)
            inputs = [held.requires_grad_(training and want) for held, want in zip(arrived, wanted, strict=True)]
        batch = {name: held for name, held in self.batches[fwd_chunk_id].items() if name in self._reads}
        found = self.chunk.root(self.code.forward, *inputs, **batch)
        if self.is_last:
            self.results[fwd_chunk_id] = {name: held.detach() for name, held in found.items()}
            outputs = [found["loss"]] if "loss" in found else []
        else:
            # A value that only passes through gets a node of its own, so that its gradient is not that of the input.
            outputs = [held.view_as(held) if any(held is given for given in inputs) else held for held in found]
        self._live[fwd_chunk_id] = outputs, inputs
        return () if self.is_last else tuple(outputs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """The gradients of the inputs, and where `full_backward` or the plan says so, those of the weights. Where nothing comes
        before this stage, all of them come with the weights."""
        if bwd_chunk_id >= self.count:
            return
        outputs, inputs = self._live.pop(bwd_chunk_id)
        if self.is_last:
            gradients: list[Tensor | None] = [torch.full_like(outputs[0], self.scale)]
        else:
            gradients = self._gradients.pop(bwd_chunk_id)
        if full_backward or self.chunk.whole_backward:
            self._returned[bwd_chunk_id] = self._full(outputs, gradients, inputs)
            if not full_backward:
                self._weights[bwd_chunk_id] = lambda: None
        elif not any(held.requires_grad for held in inputs):
            self._returned[bwd_chunk_id] = [None] * len(inputs)
            self._weights[bwd_chunk_id] = lambda: self._full(outputs, gradients, inputs)
        else:
            self._before(reduce=False)
            weights = self._gathered()
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
            given = [held for held in inputs if held.requires_grad]
            whole = [] if _nodes_last() else [o.view_as(o) for o, _ in pairs]
            with split_backward():
                found, groups = stage_backward_input([o for o, _ in pairs], [g for _, g in pairs], given, iter(weights))
            returned = iter(found)
            self._returned[bwd_chunk_id] = _or_zeros([next(returned) if i.requires_grad else None for i in inputs], inputs)
            self._weights[bwd_chunk_id] = lambda whole=whole: self._weights_only(weights, groups)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The gradients of the weights, behind those of the inputs."""
        if bwd_chunk_id < self.count:
            self._weights.pop(bwd_chunk_id)()

    def _full(self, outputs: list[Tensor], gradients: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
        self.done += 1
        self._before(reduce=self.zero >= 2 or self.done == self.count)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        found = stage_backward(tuple(o for o, _ in pairs), tuple(g for _, g in pairs), inputs)
        return _or_zeros(list(found), inputs)

    def _weights_only(self, weights: list[Tensor], groups: Any) -> None:
        self.done += 1
        _gradients_of_weights(weights, groups)
        self._reduce(self.zero >= 2 or self.done == self.count)

    # -- FSDP ------------------------------------------------------------------------------------------------------------

    def _before(self, reduce: bool) -> None:
        """What FSDP does in the backward that comes."""
        prepare(self.chunk, reduce, last=self.done == self.count)

    def _gathered(self) -> list[Tensor]:
        """The parameters as the forward used them: the leaves of its graph."""
        found = {id(p): p for home in self.chunk.unit_parameters for p in home.gathered if p.requires_grad}
        return list(found.values())

    def _reduce(self, reduce: bool) -> None:
        """Hand over to FSDP the gradients of weights that came without a backward of its own: it adds them to those in the
        masters' dtype, and sums these over dp where `reduce`."""
        self._before(reduce)
        run_post_backward(self.chunk)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """The last backward of the step has summed them already."""

    def scale_grads(self, grad_scale_factor: int) -> None:
        """The loss is divided by the labels of the global batch: there is nothing to scale."""

    def clear_runtime_states(self) -> None:
        """`begin` does that."""


@functools.cache
def _nodes_last() -> bool:
    """Whether a backward may begin at a torch.autograd.Function whose results are gone. In torch 2.11 it may not: the graph of
    a micro-batch is kept whole between the two halves of its backward."""
    x = torch.zeros((), requires_grad=True)
    node = DetachNode.apply(x).grad_fn
    try:
        _backward([(GradientEdge(node, 0), x.detach())], [_get_grad_fn_or_grad_acc(x)])
    except RuntimeError:
        return False
    return True


def _backward(begin: list[tuple[GradientEdge, Tensor]], nodes: Sequence[Any]) -> tuple[Tensor, ...]:
    """The gradients that arrive at `nodes`. torch.autograd.grad of 2.11 cannot begin at a torch.autograd.Function: it asks for
    the shape of its result."""
    edges, gradients = zip(*begin, strict=True)
    arrive = tuple(GradientEdge(node, 0) for node in nodes)
    retain_graph = create_graph = allow_unused = False
    return _engine_run_backward(edges, gradients, retain_graph, create_graph, arrive, allow_unused, accumulate_grad=False)


def _gradients_of_weights(weights: list[Tensor], groups: list[dict[str, Any]]) -> None:
    """The second half of a split backward, from the calls that `stage_backward_input` noted in `groups` to the weights.

    As torch's `stage_backward_weight`, but that one, before 2.13, adds up the gradients of all results of a call and takes the
    sum for that of the first.
    """
    of_node = {_get_grad_fn_or_grad_acc(weight): weight for weight in weights}
    for group in groups:
        calls, nodes = group.pop("intermediates"), list(group["params"])
        noted = [(call, given) for call, given in zip(calls, group.pop("grads", []), strict=False) if given is not None]
        edges = [(GradientEdge(call, i), each) for call, given in noted for i, each in enumerate(given) if each is not None]
        if not edges:
            continue
        # A call that another one of them leads to would get that one's gradient once more.
        handles = [call.register_prehook(lambda _, given=given: given) for call, given in noted] if len(noted) > 1 else []
        try:
            found = _backward(edges, nodes)
        finally:
            for handle in handles:
                handle.remove()
        for node, gradient in zip(nodes, found, strict=True):
            weight = of_node[node]
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


def _or_zeros(gradients: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """A gradient for every input that asks for one: the stage before waits for it."""
    return [
        (torch.zeros_like(held) if gradient is None else gradient) if held.requires_grad else None
        for gradient, held in zip(gradients, inputs, strict=True)
    ]


class Pipeline:
    """The stages of this rank under one schedule, for one call signature."""

    def __init__(self, stages: list[ModelStage], schedule: str, pipeline: int) -> None:
        self.stages = stages
        self._name, self._pipeline = schedule, pipeline
        self._schedules: dict[int, Any] = {}

    def train(self, batches: Sequence[Batch], scale: float) -> list[dict[str, Tensor]]:
        """Forward and backward of all micro-batches. Returns the results of each, empty where the last stage is elsewhere."""
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
        # Every rank takes its stages and micro-batches in the order of this sum: what it waits for always comes before.
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
        made = _CLASSES[self._name](stages, slots, loss_fn=lambda output, target: output, scale_grads=False)
        # Shapes are known: nothing is to be learnt by running the model once more.
        made._initialize_stage = made._initialize_stages = lambda *args, **kwargs: None
        return made


def _start(operations: list[dist.P2POp]) -> list[Any]:
    return dist.batch_isend_irecv(operations) if operations else []


def least_slots(schedule: str, micro_batches: int, pipeline: int, stages: int) -> int:
    """The least number of micro-batches, of those at least `micro_batches`, that a schedule takes."""
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
