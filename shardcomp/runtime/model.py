"""The sharded model that a user holds: HuggingFace's names, DTensor parameters, `train_step`, `eval_step` and
`optimizer_step`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from shardcomp.collectives import Axis, allreduce_identity
from shardcomp.errors import PlanError
from shardcomp.parts import Part, join, packed
from shardcomp.runtime import world
from shardcomp.runtime.allocation import Chunk, Held, Weights, allocate, held_index, tied_axes, users
from shardcomp.runtime.blueprint import COMPUTE, MASTER, Blueprint
from shardcomp.runtime.calls import Calls, LoadedCall, Lower
from shardcomp.runtime.fsdp import gather_apart, hand_on, lay_down, prepare, reset, widen_gradients
from shardcomp.runtime.gradients import (
    around_backward,
    coefficient,
    global_norm,
    not_finite,
    scale_gradients,
)
from shardcomp.runtime.ledger import held_bytes
from shardcomp.runtime.optimizer import AdamW
from shardcomp.runtime.random import Streams
from shardcomp.runtime.scaling import LossScale
from shardcomp.runtime.whole import whole as together
from shardcomp.schedules import SCHEDULES


@dataclass(frozen=True)
class StepResult:
    """What a step tells.

    loss: the mean loss over the labels that count in the global batch; tokens: how many those are; skipped: whether a gradient
    of the step is not finite, so that `optimizer_step` will skip. All are 0-d tensors, the same on every rank. logits: those of
    this data-parallel rank's samples, a DTensor that is split on the vocabulary, where they were asked for and this pipeline
    rank has the last stage.
    """

    loss: Tensor
    tokens: Tensor
    skipped: Tensor
    logits: Any = None


class ShardedModel(nn.Module):
    """One rank's part of a model.

    Parameters have their HuggingFace names and are DTensors; `mesh` is the `DeviceMesh` with the axes pp, dp, cp, tp. Under a
    pipeline they are those of this rank's stages. A batch is this data-parallel rank's samples, the same on every rank of one
    pp and tp group. `random` is what dropout draws from: the same seed, mesh and sequence of calls give the same numbers, and
    torch's own generators are left alone. `loss_scale` is that of fp16. `skipped_steps` counts the optimizer steps that were
    skipped because gradients were not finite.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        tree: nn.Module,
        chunks: list[Chunk],
        mesh: DeviceMesh,
        device: torch.device,
        axes: dict[str, Axis],
        tied: dict[tuple[int, ...], Axis],
        config: Any = None,
        lower: Lower | None = None,
    ) -> None:
        super().__init__()
        # Not a child: its parameters are those of the tree, under other names.
        object.__setattr__(self, "_chunks", chunks)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in blueprint.persistent_buffers)
        self.config = config
        self.mesh = mesh
        self.device = device
        self._axes = axes
        coordinates = {name: axis.rank for name, axis in axes.items()}
        self.random = Streams(blueprint.seed, blueprint.mesh, coordinates, device)
        self.loss_scale = LossScale(enabled=blueprint.precision == "fp16")
        self.skipped_steps = 0
        self._bad: Tensor | None = None  # the bad gradients since the last optimizer step, counted by rank
        self._scaled = False  # whether gradients are multiplied by the loss scale: within a backward
        self._blueprint = blueprint
        self._users = users(blueprint)
        self._calls = Calls(self, blueprint, chunks, axes, tied, device, self.random, lower)

    def forward(self, num_items_in_batch: Tensor | int | None = None, return_logits: bool = False, **batch: Tensor) -> Any:
        """The model's own output type. `loss`, where labels are given, is the mean over all labels that count in the global
        batch, or over `num_items_in_batch`; `logits`, where no labels are given or `return_logits`, is a DTensor that is split
        on the vocabulary. Raises PlanError under a pipeline, whose micro-batches `train_step` and `eval_step` run."""
        if self._blueprint.mesh.pp > 1:
            raise PlanError("a pipeline runs whole steps: call train_step(...) to train, eval_step(...) to evaluate")
        self._check(batch)
        labelled = "labels" in batch
        outputs = (("loss",) if labelled else ()) + (("logits",) if return_logits or not labelled else ())
        code = self._calls.of(batch, outputs, self.training)
        inputs = dict(batch)
        if labelled:
            count = self._tokens(code, batch) if num_items_in_batch is None else num_items_in_batch
            inputs["num_items_in_batch"] = torch.as_tensor(count, device=self.device)
        [chunk] = self._chunks
        prepare(chunk, reduce=True, last=True)
        with self._restoring():
            found = chunk.root(code.stages[0].forward, **inputs)
        if not torch.is_grad_enabled():
            self._lay_down()
        if "loss" in found:

            def end() -> None:
                self._note(self._agree([], self._end_backward(code))[1])

            found["loss"] = around_backward(found["loss"], lambda: self._begin_backward(code), end)
            found["loss"] = allreduce_identity(found["loss"], self._axes["dp"])
        for name, (dim, size) in code.blueprint.output_split.items():
            found[name] = _as_dtensor(found[name], self.mesh, dim, size)
        return _output_type(code.blueprint.output_type)(**found)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer updates, also while a forward is under way with copies of them in their place."""
        self._lay_down()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `named_parameters`: this rank's DTensors under HuggingFace's names, and the buffers that are saved."""
        self._lay_down()
        return super().state_dict(*args, **kwargs)

    def _lay_down(self) -> None:
        """Put the parameters themselves back where a forward without a backward left its copies. FSDP takes them up again."""
        for chunk in self._chunks:
            lay_down(chunk)

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Where what runs within fails on every rank, parameters and random numbers are as before."""
        before = self.random.state_dict()
        try:
            yield
        except Exception:
            for chunk in self._chunks:
                reset(chunk, self.device)
            self.random.load_state_dict(before)
            raise

    def train_step(self, **batch: Tensor) -> StepResult:
        """Forward and backward of all micro-batches. Gradients are those of the loss it returns, summed over data-parallel
        ranks, and add to gradients that stand.

        A step that fails on every rank, such as one with a token that is not in the vocabulary, leaves no gradients at all, and
        the next is made as if it had not been. Where ranks wait for one that failed, or under a pipeline, whose stages are at
        different micro-batches, training starts again from a checkpoint.
        """
        self._check(batch)
        if "labels" not in batch:
            raise PlanError("train_step: no labels; give labels=, with -100 where a token does not count")
        pieces = self._micro_batches(batch)
        code = self._calls.of(pieces[0], ("loss",), self.training)
        tokens = self._tokens(code, *pieces)
        pieces = [{**piece, "num_items_in_batch": tokens} for piece in pieces]
        scale = self._begin_backward(code)
        try:
            with self._restoring():
                if code.pipeline is None:
                    losses = [self._backward(code, piece, scale, last=piece is pieces[-1]) for piece in pieces]
                else:
                    losses = [found["loss"] for found in code.pipeline.train(pieces, scale)]
                self._lay_down()
                loss, bad = self._agree(losses, self._end_backward(code))
        except BaseException:
            code.partial.forget()
            self._scaled, self._bad = False, None
            self.zero_grad()
            raise
        self._note(bad)
        return StepResult(loss, tokens, bad > 0)

    def eval_step(self, return_logits: bool = False, **batch: Tensor) -> StepResult:
        """Forward of all micro-batches without gradients, through the same stages. The loss is that of `train_step`, in the
        mode that the model is in."""
        self._check(batch)
        if "labels" not in batch:
            raise PlanError("eval_step: no labels; give labels=, with -100 where a token does not count")
        pieces = self._micro_batches(batch)
        code = self._calls.of(pieces[0], ("loss", "logits") if return_logits else ("loss",), self.training)
        tokens = self._tokens(code, *pieces)
        pieces = [{**piece, "num_items_in_batch": tokens} for piece in pieces]
        with self._restoring():
            if code.pipeline is None:
                with torch.no_grad():
                    found = [self._chunks[0].root(code.stages[0].forward, **piece) for piece in pieces]
            else:
                found = code.pipeline.evaluate(pieces)
        self._lay_down()
        loss, bad = self._agree([each["loss"] for each in found], torch.zeros((), device=self.device))
        logits = None
        if return_logits and found:
            logits = torch.cat([each["logits"] for each in found])[: next(iter(batch.values())).shape[0]]
            if "logits" in code.blueprint.output_split:
                logits = _as_dtensor(logits, self.mesh, *code.blueprint.output_split["logits"])
        return StepResult(loss, tokens, bad > 0, logits)

    def optimizer_step(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None, max_norm: float = math.inf) -> bool:
        """`optimizer.step()`, unless a backward since the last call left gradients that are not finite: then nothing changes,
        on any rank, and `skipped_steps` counts one more. Returns whether the step was made. Adapts the loss scale of fp16.

        max_norm: what the gradients are clipped to first. norm: what `grad_norm` returned, where it was called already; if it
        is not finite, there is no step. `shardcomp.AdamW` does all of this while it updates: the update is under way before
        anything is waited for, and the gradients stay as they are.
        """
        if norm is None and max_norm != math.inf:
            norm = self.grad_norm()
        bad, self._bad = self._bad, None
        if norm is not None:
            overflow = (~norm.isfinite()).to(norm.dtype)
            bad = overflow if bad is None else bad + overflow
        if isinstance(optimizer, AdamW):
            optimizer.found_inf = torch.zeros((), device=self.device) if bad is None else bad
            try:
                optimizer.step(norm=norm, max_norm=max_norm)
            finally:
                del optimizer.found_inf
            skipped = bad is not None and bool(bad > 0)
        else:
            skipped = bad is not None and bool(bad > 0)
            if not skipped:
                if norm is not None and max_norm != math.inf:
                    scale_gradients(self.parameters(), coefficient(norm, max_norm))
                optimizer.step()
        self.loss_scale.update(skipped)
        self.skipped_steps += skipped
        return not skipped

    def _note(self, bad: Tensor) -> None:
        self._bad = bad if self._bad is None else self._bad + bad

    def _begin_backward(self, code: LoadedCall) -> float:
        """Called before a backward, once for each loss that it starts from; returns what that is to be multiplied by."""
        scale = self.loss_scale.scale
        if not self._scaled:
            scale_gradients(self.parameters(), scale)  # those that stand are divided by it with the new ones
        self._scaled = True
        code.partial.set_aside()
        return scale

    def _end_backward(self, code: LoadedCall) -> Tensor:
        """Called when every gradient of a backward is there; returns whether one on this rank is not finite: 0 or 1, []."""
        for chunk in self._chunks:
            hand_on(chunk)
        code.partial.add_up()
        if self._scaled:
            scale_gradients(self.parameters(), 1 / self.loss_scale.scale)
        self._scaled = False
        return not_finite(self.parameters(), self.device)

    def _agree(self, losses: list[Tensor], bad: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all micro-batches and samples, and the number of ranks with bad gradients, the same on every rank."""
        dtype = MASTER[self._blueprint.precision]
        loss = torch.stack(losses).sum().to(dtype) if losses else torch.zeros((), dtype=dtype, device=self.device)
        both = torch.stack([loss, bad.to(dtype)])
        for axis in ("dp", "pp"):
            both = self._axes[axis].all_reduce(both)
        return both[0], self._axes["tp"].all_reduce(both[1])

    def _backward(self, code: LoadedCall, piece: Mapping[str, Tensor], scale: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch. Returns its part of the loss."""
        [chunk] = self._chunks
        prepare(chunk, reduce=last or self._blueprint.zero >= 2, last=last)
        loss = chunk.root(code.stages[0].forward, **piece)["loss"]
        loss.backward(torch.full_like(loss, scale))
        return loss.detach()

    def _micro_batches(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The batch in pieces. The last may be smaller; under a pipeline, whose pieces are of one size, it is filled up with
        samples that do not count."""
        rows = next(iter(batch.values())).shape[0]
        size = min(self._blueprint.micro_batch or rows, rows)
        missing = -rows % size if self._blueprint.mesh.pp > 1 else 0
        if missing:
            batch = {name: torch.cat([held, held[:1].expand(missing, *held.shape[1:])]) for name, held in batch.items()}
            batch["labels"] = batch["labels"].clone()
            batch["labels"][rows:] = self._blueprint.ignored_label
        return [{name: held[at : at + size] for name, held in batch.items()} for at in range(0, rows + missing, size)]

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradients over every axis, tied weights counted once: [], the same on every rank, not finite
        where a gradient is not. Nothing is waited for."""
        self._lay_down()
        again = [
            self.get_parameter(chunk.names[name])
            for chunk in self._chunks
            for name in chunk.names
            if self._users[name][0] != chunk.index
        ]
        return global_norm(self.parameters(), self._axes, self.device, MASTER[self._blueprint.precision], again)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global 2-norm of at most `max_norm`, over every axis; returns the norm before."""
        norm = self.grad_norm()
        scale_gradients(self.parameters(), coefficient(norm, max_norm))
        return norm

    @property
    def blueprint(self) -> Blueprint:
        """What this model was lowered to."""
        return self._blueprint

    def held_parameters(self) -> dict[str, Held]:
        """The pieces of parameters that this rank holds, by their names in the model."""
        self._lay_down()
        coordinates = {name: axis.rank for name, axis in self._axes.items()}
        copies: dict[str, list[nn.Parameter]] = {}
        for chunk in self._chunks:
            for name, held in chunk.names.items():
                copies.setdefault(name, []).append(self.get_parameter(held))
        return {
            name: Held(self._blueprint.parameters[name].shape, held_index(self._blueprint, name, coordinates), tuple(held))
            for name, held in copies.items()
        }

    def held_buffers(self) -> dict[str, Tensor]:
        """The buffers of the model's state that this rank has, whole."""
        found = {name: self._get(name) for name in self._blueprint.persistent_buffers}
        return {name: held for name, held in found.items() if held is not None}

    def held_bytes(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, dict[str, int]]:
        """What this rank holds now: "device" or "host" -> "parameters", "gathered" (copies in the compute dtype), "unreduced"
        (gradients before their sum over dp), "gradients" or "optimizer" (the states of the one given) -> bytes. Activations are
        not counted."""
        set_aside = [held for partial in self._calls.partials.values() for held in partial.held()]
        return held_bytes(self._chunks, self.device, optimizer, set_aside)

    def save_pretrained(self, path: str | Path, max_shard_size: int = 5 * 1024**3) -> None:
        """Write a HuggingFace directory (config.json, safetensors) from all ranks together; no rank holds the whole model."""
        from shardcomp.runtime.huggingface import save_pretrained

        self._lay_down()
        parts = {name: plan.part for name, plan in self._blueprint.parameters.items()}
        names = {**packed(parts), **{name: [name] for name in self._blueprint.persistent_buffers}}
        if not getattr(self.config, "tie_word_embeddings", True):
            # Tied by hand: the configuration will not tie them when the files are read.
            names |= {alias: [alias] for plan in self._blueprint.parameters.values() for alias in plan.aliases}
        entries = []
        for name, pieces in names.items():
            shape, dtype = self._shape(pieces[0])
            part = parts.get(pieces[0])
            fetch = self._fetcher(name, {piece: parts.get(piece) for piece in pieces})
            entries.append((name, part.shape if part else shape, dtype, fetch))
        writer = torch.distributed.get_rank() == 0
        save_pretrained(path, entries, self.config, is_writer=writer, max_shard_size=max_shard_size)
        torch.distributed.barrier()  # the directory is there for whoever goes on

    def _fetcher(self, name: str, parts: Mapping[str, Part | None]) -> Callable[[], Tensor]:
        """The collective call that returns a tensor whole, a packed one of its pieces."""

        def whole(piece: str) -> Tensor:
            held = self._get(piece)
            return self._from_its_stage(piece, held if held is None else together(held.detach())).cpu()

        if name in parts:
            return lambda: whole(name)
        return lambda: join(name, parts, {piece: whole(piece) for piece in parts})

    def _get(self, name: str) -> Tensor | None:
        """A parameter or buffer by its name, or by another name of a tied one; None where only other pipeline ranks have it."""
        first = self._first_name(name)
        held = next((chunk.names[first] for chunk in self._chunks if first in chunk.names), first)
        path, _, leaf = held.rpartition(".")
        try:
            found: Tensor = getattr(self.get_submodule(path), leaf)
        except AttributeError:
            return None
        return found

    def _first_name(self, name: str) -> str:
        aliases = {alias: known for known, plan in self._blueprint.parameters.items() for alias in plan.aliases}
        return aliases.get(name, name)

    def _shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The whole shape and the dtype of a parameter or buffer of the model."""
        plan = self._blueprint.parameters.get(self._first_name(name))
        if plan is not None:
            return plan.shape, MASTER[self._blueprint.precision]
        buffer = self._blueprint.buffers[name]
        return tuple(buffer.shape), buffer.dtype

    def _from_its_stage(self, name: str, held: Tensor | None) -> Tensor:
        """A whole tensor, from the first pipeline rank that has it to all that share its place on the other axes."""
        axis = self._axes["pp"]
        if axis.size == 1:
            assert held is not None
            return held
        stages = self._users.get(self._first_name(name)) or [
            unit.stage for unit in self._blueprint.units if name in unit.buffers.values()
        ]
        if not stages:  # a buffer that no unit uses, which every rank has
            assert held is not None
            return held
        source = SCHEDULES[self._blueprint.schedule].rank_of(stages[0], axis.size)
        if held is None or axis.rank != source:
            shape, dtype = self._shape(name)
            held = torch.empty(shape, dtype=dtype, device=self.device)
        held = held.to(self.device).contiguous()
        torch.distributed.broadcast(held, group=axis.group, group_src=source)
        return held

    def _tokens(self, code: LoadedCall, *pieces: Mapping[str, Tensor]) -> Tensor:
        """The labels of the global batch that the loss is a mean over."""
        with torch.no_grad():
            mine = [code.stages[0].tokens(**{name: piece[name] for name in code.blueprint.token_inputs}) for piece in pieces]
            return self._axes["dp"].all_reduce(torch.stack(mine).sum())

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse what would fail inside the forward, or go wrong silently."""
        if not batch:
            raise PlanError("no inputs: give at least input_ids=")
        wrong = [f"{n} = {type(held).__name__}" for n, held in batch.items() if not isinstance(held, Tensor)]
        if wrong:
            raise PlanError(f"inputs must be tensors, but {', '.join(wrong)}")
        shapes = {n: tuple(held.shape[:2]) for n, held in batch.items()}
        if len(set(shapes.values())) > 1:
            raise PlanError(f"inputs of one call share batch and length, but these do not: {shapes}")
        length = next(iter(shapes.values()))[1]
        multiple = self._blueprint.sequence_multiple
        if length % multiple:
            longer = -(-length // multiple) * multiple
            raise PlanError(
                f"a sequence of {length} does not split over tensor = {multiple} under sequence parallelism; the next length "
                f"that does is {longer}: pad with labels of -100, or set sequence_parallel = false"
            )


def _as_dtensor(held: Tensor, mesh: DeviceMesh, dim: int, size: int) -> DTensor:
    shape = torch.Size([*held.shape[:dim], size, *held.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, mesh["tp"], [Shard(dim)], run_check=False, shape=shape, stride=stride)


def _output_type(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def build(
    blueprint: Blueprint,
    weights: Weights,
    config: Any = None,
    lower: Lower | None = None,
) -> ShardedModel:
    """Allocate this rank's part of a lowered model and hand it over. `weights` is asked for this rank's part of each
    parameter."""
    public, device = world.start(blueprint.mesh)
    mesh = blueprint.mesh.engine_mesh(public)
    factored = blueprint.mesh.engine_mesh(public, factored=True) if blueprint.mesh.copies > 1 else mesh
    axes = world.axes_of(public, mesh, factored)
    tree, chunks = allocate(blueprint, weights, mesh, factored, {name: axis.rank for name, axis in axes.items()}, device)
    for chunk in chunks:
        gather_apart(chunk)
        if COMPUTE[blueprint.precision] != MASTER[blueprint.precision]:
            widen_gradients(chunk)
    return ShardedModel(blueprint, tree, chunks, public, device, axes, tied_axes(blueprint, public), config, lower)
