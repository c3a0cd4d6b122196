"""The sharded model that a user holds: HuggingFace's names, DTensor parameters, `train_step`, `eval_step` and
`optimizer_step`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardcomp.errors import PlanError, ShardError
from shardcomp.ir.collectives import Axis, allreduce_identity
from shardcomp.ir.packed import PackedSlice, assemble, group_by_packed
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime import world
from shardcomp.runtime.agreement import Agreed, Agreement
from shardcomp.runtime.allocation import LocalShard, StageShard, held_index, users
from shardcomp.runtime.backward import BackwardPasses, around_backward
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.call_cache import CallCache, LoadedCall, Lower
from shardcomp.runtime.contexts import check_contexts, computable, say_where
from shardcomp.runtime.fsdp import (
    check_not_replaced,
    named_parameters,
    prepare,
    reset,
    reshard,
)
from shardcomp.runtime.gathering import full_tensor as together
from shardcomp.runtime.gradients import coefficient, global_norm, local, scale_gradients
from shardcomp.runtime.hooks import DenseShard, ParameterHooks
from shardcomp.runtime.inputs import named_inputs, shapes_of
from shardcomp.runtime.loss_scale import LossScale
from shardcomp.runtime.memory import memory_by_role
from shardcomp.runtime.micro_batches import filled_up, one_sample, split, uncounted
from shardcomp.runtime.module_contract import Namespace, SealedModule, refuse
from shardcomp.runtime.optimizer import AdamW
from shardcomp.runtime.origin import Origin
from shardcomp.runtime.outputs import as_output, computed_of, output_type
from shardcomp.runtime.random import Streams
from shardcomp.runtime.trained import TrainedParameters

CALL = "sharded(...)"
"""How messages name a call of the model that is no step."""
_EXCHANGED = ("tp", "pp", "dp")
"""The axes that a call is compared along, in this order: dp last, which tells what the others found."""


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


class ShardedModel(SealedModule):
    """One rank's part of a model.

    Parameters have their HuggingFace names and are DTensors; `mesh` is the `DeviceMesh` with the axes pp, dp, cp, tp. Under a
    pipeline they are those of this rank's stages. A batch is this data-parallel rank's samples, the same on every rank of one
    pp and tp group. `random` is what dropout draws from: the same seed, mesh and sequence of calls give the same numbers, and
    torch's own generators are left alone. `loss_scale` is that of fp16. `skipped_steps` counts the optimizer steps that were
    skipped because gradients were not finite. `training` is the mode that the dense model was in, until `train` or `eval`.

    What training code does to a plain module works as it does there or raises PlanError: `docs/module_contract.md`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        tree: nn.Module,
        stage_shards: list[StageShard],
        mesh: DeviceMesh,
        device: torch.device,
        axes: dict[str, Axis],
        tied: dict[tuple[int, ...], Axis],
        origin: Origin,
        lower: Lower | None = None,
    ) -> None:
        super().__init__()
        # Not a child: its parameters are those of the tree, under other names.
        object.__setattr__(self, "_chunks", stage_shards)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in blueprint.persistent_buffers)
        self.config = origin.config
        self.generation_config = origin.generation_config
        self.mesh = mesh
        self.device = device
        self._origin = origin
        self._axes = axes
        self._coordinates = {name: axis.rank for name, axis in axes.items()}
        self.random = Streams(blueprint.seed, blueprint.mesh, self._coordinates, device)
        self.loss_scale = LossScale(enabled=blueprint.precision == "fp16")
        self.skipped_steps = 0
        self._bad: Tensor | None = None  # the bad gradients since the last optimizer step, counted by rank
        self._blueprint = blueprint
        self._users = users(blueprint)
        self._calls = CallCache(self, blueprint, stage_shards, axes, tied, device, self.random, lower)
        self._named = [entry for stage_shard in stage_shards for entry in named_parameters(stage_shard)]
        self._passes = BackwardPasses(stage_shards, lambda: self.loss_scale.scale, self._hooks(), device)
        on_cpu = device.type == "cpu"
        host = {} if on_cpu else world.host_axes(mesh, _told_to_hosts(blueprint))
        self._agreement = Agreement(axes, device, blueprint.compare_ranks, at_once=on_cpu, host=host)
        self._trained = TrainedParameters(self._named, blueprint)
        self._mode = origin.mode
        for module in self.children():
            if isinstance(module, Namespace):
                module.seal(self._lay_down)
        self._set_training(origin.training)
        self._sealed = True

    def _hooks(self) -> ParameterHooks:
        """The hooks on this rank's parameters, and those that the dense model's had."""
        shards: dict[str, list[DenseShard]] = {}
        copies: dict[str, list[nn.Parameter]] = {}
        for name, entry in self._named:
            copies.setdefault(name, []).append(entry.sharded_param)
        for name, same in copies.items():
            part = self._blueprint.parameters[name].part
            index = held_index(self._blueprint, name, self._coordinates)
            shards.setdefault(part.of if part else name, []).append(DenseShard(name, tuple(same), part, index))
        return ParameterHooks([p for same in copies.values() for p in same], self._origin.hooks, shards)

    def train(self, mode: bool = True) -> ShardedModel:
        """Set the mode of the whole model."""
        self._mode = mode
        self._set_training(mode)
        return self

    def _set_training(self, mode: bool) -> None:
        self.training = mode
        for module in self.children():
            if isinstance(module, Namespace):
                module.set_mode(mode)

    def forward(
        self, *args: Any, num_items_in_batch: Tensor | int | None = None, return_logits: bool | str = False, **batch: Any
    ) -> Any:
        """Call the model on this data-parallel rank's samples.

        Whatever is computed of the outputs, `.backward()` leaves the dense model's gradients, summed over dp.

        Args:
            args: what the model takes by position, as the dense model does.
            num_items_in_batch: what the loss is divided by instead of the labels of the global batch that count.
            return_logits: whether to return them beside a loss; "whole" for logits that are not split on the vocabulary.
            batch: tensors [b, s].

        Returns:
            The model's own output type. `loss`, where labels are given, is the mean over all labels that count in the global
            batch, a number on every rank. `logits`, where no labels are given or `return_logits`, is a DTensor that is split on
            the vocabulary under tensor parallelism, and else a plain tensor; `logits.full_tensor()` is whole under every plan.

        Raises:
            PlanError: under a pipeline, whose micro-batches `train_step` and `eval_step` run; for a call that cannot be made.
            BatchError: for a token or label outside of the vocabulary.

        Example:
            out = sharded(input_ids=ids)
            my_loss(out.logits.full_tensor(), labels).backward()
        """
        if self._blueprint.mesh.pp > 1:
            raise PlanError("a pipeline runs whole steps: call train_step(...) to train, eval_step(...) to evaluate")
        _check_return_logits(return_logits)
        inputs = named_inputs(CALL, args, batch, self._blueprint, self.device)
        with self._running(CALL, inputs):
            return self._forward(inputs, num_items_in_batch, return_logits)

    def _forward(self, batch: dict[str, Tensor], num_items_in_batch: Tensor | int | None, return_logits: bool | str) -> Any:
        outputs = self._outputs_of(batch, bool(return_logits))
        counts = "loss" in outputs and num_items_in_batch is None
        # Without a loss nothing connects the data-parallel ranks: one of them may evaluate alone.
        axes = _EXCHANGED if "loss" in outputs else ("tp",)
        code, agreed = self._agree_on(CALL, [batch], outputs, axes, counts)
        inputs = dict(batch)
        if "loss" in outputs:
            inputs["num_items_in_batch"] = torch.as_tensor(
                agreed.tokens if num_items_in_batch is None else num_items_in_batch, device=self.device
            )
        [stage_shard] = self._chunks
        prepare(stage_shard, reduce=True, last=True)
        with self._restoring():
            results = stage_shard.root(code.stages[0].forward, **inputs)
        if not torch.is_grad_enabled():
            self._lay_down()
        differentiable = [name for name, tensor in results.items() if tensor.requires_grad]
        if differentiable:
            self._watch(results, differentiable, code, agreed)
        for name, tensor in results.items():
            if name != "loss":
                split = code.blueprint.output_split.get(name)
                results[name] = as_output(tensor, self.mesh, split, return_logits == "whole")
        if "loss" in results:
            results["loss"] = computed_of(allreduce_identity(results["loss"], self._axes["dp"]), results.get("logits"))
        return output_type(code.blueprint.output_type)(**results)

    def _watch(self, results: dict[str, Tensor], names: list[str], code: LoadedCall, agreed: Agreed) -> None:
        """Have every backward that starts from these outputs begin and end as one of this model."""
        versions, exchanged = (
            self._versions(),
            "loss" in results,
        )  # not `results` itself: the outputs would keep each other alive
        late: list[Tensor] = []  # answers that are still on the device

        def begin(number: int) -> tuple[bool, float]:
            if self._versions() != versions:
                raise PlanError(
                    "weights were changed between a call and its backward, whose gradients would be of neither: call "
                    ".backward() before the optimizer steps, or call the model again"
                )
            first = self._passes.begin(code, number)
            if first and not exchanged:  # dp has compared nothing yet, and is about to sum gradients
                digest, _ = self._trained.look()
                here = self._agreement.exchange("a backward", {}, {}, ("dp",), torch.zeros_like(agreed.tokens), trained=digest)
                late[:] = [] if here.bad is None else [here.bad]
            return first, self.loss_scale.scale

        def end() -> None:
            bad = self._passes.end()
            self._note(self._sum([], sum(late, bad if agreed.bad is None else bad + agreed.bad))[1])

        results.update(zip(names, around_backward([results[name] for name in names], begin, end), strict=True))

    def _versions(self) -> list[tuple[int, int]]:
        """How often each parameter was written to, as a DTensor and as this rank's part of one."""
        with torch.no_grad():  # so that `to_local` gives the tensor itself, and no view with a count of its own
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

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer updates, also while a forward is under way with copies of them in their place."""
        self._lay_down()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `named_parameters`: this rank's DTensors under HuggingFace's names, and the buffers that are saved."""
        self._lay_down()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch has it. Numbers are copied also where `assign`, so that optimizers keep their parameters."""
        self._lay_down()
        return super().load_state_dict(state_dict, strict=strict, assign=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, also those that a backward left which ended in an exception."""
        self._passes.recover()
        super().zero_grad(set_to_none)

    def _lay_down(self) -> None:
        """Put the parameters themselves back where a forward without a backward left its copies. FSDP takes them up again."""
        for stage_shard in self._chunks:
            reshard(stage_shard)

    @contextmanager
    def _running(self, call: str, batch: Mapping[str, Tensor], training: bool = False) -> Iterator[None]:
        """Every call of the model runs within this: in contexts that it can be computed in, and with errors that say where."""
        if call != CALL and (self._forward_hooks or self._forward_pre_hooks):
            refuse(f"{call} with forward hooks on the sharded model", f"they are called by {CALL}; remove them")
        check_contexts(call, training)
        self._passes.recover()
        for stage_shard in self._chunks:
            check_not_replaced(stage_shard)
        with computable(call, self.device, self._blueprint.precision):
            try:
                yield
            except ShardError:
                raise
            except Exception as error:
                hint = "the dense model, called with the same batch, tells whether the error is its own"
                say_where(error, f"{call} of {shapes_of(batch)} failed on {self._where()}", hint)
                raise

    def _where(self) -> str:
        """This rank and the plan, in words."""
        at = ", ".join(f"{name} {axis.rank} of {axis.size}" for name, axis in self._axes.items() if axis.size > 1)
        mesh, first = self._blueprint.mesh, self._blueprint
        plan = f"tensor = {mesh.tp}, pipeline = {mesh.pp}, data = {mesh.dp}, zero = {first.zero}, precision = {first.precision}"
        return f"rank {torch.distributed.get_rank()}{f' ({at})' if at else ''} of the plan {plan}"

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Where what runs within fails on every rank, parameters and random numbers are as before."""
        before = self.random.state_dict()
        try:
            yield
        except Exception:
            for stage_shard in self._chunks:
                reset(stage_shard, self.device)
            self.random.load_state_dict(before)
            raise

    def train_step(self, **batch: Any) -> StepResult:
        """Forward and backward of all micro-batches. Gradients are those of the loss it returns, summed over data-parallel
        ranks, and add to gradients that stand.

        Data-parallel ranks may have different numbers of samples, none included.

        A step that fails on every rank leaves no gradients at all, and the next is made as if it had not been. Where ranks wait
        for one that failed, or under a pipeline, whose stages are at different micro-batches, training starts again from a
        checkpoint. A batch that is refused, such as one with a token outside of the vocabulary, leaves everything as it was.

        Args:
            batch: this rank's samples, [b, s] each: `labels`, with -100 where a token does not count, and what the model takes.

        Raises:
            PlanError: for a call that cannot be made, and where ranks of one pp and tp group have different batches.
            BatchError: for a token or label outside of the vocabulary.

        Example:
            step = sharded.train_step(input_ids=ids, labels=ids)
        """
        inputs = named_inputs("train_step", (), batch, self._blueprint, self.device)
        with self._running("train_step", inputs, training=True):
            return self._train_step(inputs)

    def _train_step(self, batch: dict[str, Tensor]) -> StepResult:
        self._need_labels("train_step", batch)
        code, agreed, micro_batches = self._micro_batches("train_step", batch, ("loss",))
        self._passes.begin(code)
        scale = self.loss_scale.scale
        try:
            with self._restoring():
                if code.pipeline is None:
                    losses = [
                        self._backward(code, micro_batch, scale, last=micro_batch is micro_batches[-1])
                        for micro_batch in micro_batches
                    ]
                else:
                    losses = [found["loss"] for found in code.pipeline.train(micro_batches, scale)]
                self._lay_down()
                bad = self._passes.end()
                loss, bad = self._sum(losses, bad if agreed.bad is None else bad + agreed.bad)
        except BaseException:
            self._passes.discard()
            self._bad = None
            raise
        self._note(bad)
        return StepResult(loss, agreed.tokens, bad > 0)

    def eval_step(self, return_logits: bool | str = False, **batch: Any) -> StepResult:
        """Forward of all micro-batches without gradients, through the same stages. The loss is that of `train_step`, in the
        mode that the model is in. Arguments are those of `train_step`, `return_logits` is that of a call."""
        _check_return_logits(return_logits)
        inputs = named_inputs("eval_step", (), batch, self._blueprint, self.device)
        with self._running("eval_step", inputs), torch.no_grad():
            return self._eval_step(inputs, return_logits)

    def _eval_step(self, batch: dict[str, Tensor], return_logits: bool | str) -> StepResult:
        self._need_labels("eval_step", batch)
        code, agreed, micro_batches = self._micro_batches(
            "eval_step", batch, ("loss", "logits") if return_logits else ("loss",)
        )
        with self._restoring():
            if code.pipeline is None:
                results = [self._chunks[0].root(code.stages[0].forward, **micro_batch) for micro_batch in micro_batches]
            else:
                results = code.pipeline.evaluate(micro_batches)
        self._lay_down()
        loss, bad = self._sum([result["loss"] for result in results], torch.zeros((), device=self.device))
        logits = None
        if return_logits and results:
            rows = next(iter(batch.values())).shape[0]
            logits = torch.cat([result["logits"] for result in results])[:rows]
            logits = as_output(logits, self.mesh, code.blueprint.output_split.get("logits"), return_logits == "whole")
        return StepResult(loss, agreed.tokens, bad > 0, logits)

    def _need_labels(self, call: str, batch: Mapping[str, Tensor]) -> None:
        if "labels" not in batch:
            raise PlanError(f"{call}: no labels; give labels=, with -100 where a token does not count")

    def optimizer_step(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None, max_norm: float = math.inf) -> bool:
        """`optimizer.step()`, unless a backward since the last call left gradients that are not finite: then nothing changes,
        on any rank, and `skipped_steps` counts one more. Returns whether the step was made. Adapts the loss scale of fp16.

        max_norm: what the gradients are clipped to first. norm: what `grad_norm` returned, where it was called already; if it
        is not finite, there is no step. `shardcomp.AdamW` does all of this while it updates: the update is under way before
        anything is waited for, and the gradients stay as they are.
        """
        if isinstance(optimizer, torch.optim.Adafactor) and any(_is_split(p) for p in self.parameters()):
            raise PlanError(
                f"optimizer_step(Adafactor) on {self._where()}: torch's Adafactor reads the norms of one shard, and lacks "
                "operators for DTensors; use shardcomp.AdamW, or a plan that splits no parameter: zero = 0 without tensor"
            )
        try:
            return self._optimizer_step(optimizer, norm, max_norm)
        except ShardError:
            raise
        except Exception as error:
            kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            say_where(
                error,
                f"optimizer_step({kind}) failed on {self._where()}",
                "docs/module_contract.md lists the optimizers that run on DTensors; shardcomp.AdamW asks nothing of them",
            )
            raise

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, norm: Tensor | None, max_norm: float) -> bool:
        self._passes.recover()
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
        if skipped:
            self._agreement.poll(wait=True)  # the step was skipped, and waited for: a batch may have been why
        return not skipped

    def _note(self, bad: Tensor) -> None:
        self._bad = bad if self._bad is None else self._bad + bad

    def _sum(self, losses: list[Tensor], bad: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all micro-batches and samples, and the number of ranks with bad gradients, the same on every rank."""
        dtype = MASTER[self._blueprint.precision]
        loss = torch.stack(losses).sum().to(dtype) if losses else torch.zeros((), dtype=dtype, device=self.device)
        both = torch.stack([loss, bad.to(dtype)])
        for axis in ("dp", "pp"):
            both = self._axes[axis].all_reduce(both)
        return both[0], self._axes["tp"].all_reduce(both[1])

    def _backward(self, code: LoadedCall, micro_batch: Mapping[str, Tensor], scale: float, last: bool) -> Tensor:
        """Forward and backward of one micro-batch. Returns its part of the loss."""
        [stage_shard] = self._chunks
        prepare(stage_shard, reduce=last or self._blueprint.zero >= 2, last=last)
        loss = stage_shard.root(code.stages[0].forward, **micro_batch)["loss"]
        loss.backward(torch.full_like(loss, scale))
        return loss.detach()

    def _micro_batches(
        self, call: str, batch: dict[str, Tensor], outputs: tuple[str, ...]
    ) -> tuple[LoadedCall, Agreed, list[dict[str, Tensor]]]:
        """A step's code, what the ranks know of it, and its micro-batches.

        From zero = 2 the ranks of dp exchange parameters and gradients in every micro-batch: one that has fewer than another
        computes some that do not count.
        """
        rows = next(iter(batch.values())).shape[0]
        size = max(1, min(self._blueprint.micro_batch or rows, rows))
        if not rows:
            batch = one_sample(batch, self._blueprint)
        code = self._calls.of({name: tensor[:size] for name, tensor in batch.items()}, outputs, self._mode)
        one_size = self._blueprint.mesh.pp > 1 or code.blueprint.static_shape is not None
        batch = filled_up(batch, rows, -(-rows // size) * size if one_size and rows else max(rows, 1), code.blueprint)
        micro_batches = split(batch, size)
        code, agreed = self._agree_on(call, micro_batches, outputs, _EXCHANGED, counts=True, whole=batch)
        if self._blueprint.zero >= 2:
            micro_batches += [
                uncounted(micro_batches[0], 0, code.blueprint) for _ in range(agreed.micro_batches - len(micro_batches))
            ]
        return code, agreed, [{**piece, "num_items_in_batch": agreed.tokens} for piece in micro_batches]

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradients over every axis, tied weights counted once: [], the same on every rank, not finite
        where a gradient is not. Nothing is waited for."""
        self._lay_down()
        again = [
            self.get_parameter(stage_shard.names[name])
            for stage_shard in self._chunks
            for name in stage_shard.names
            if self._users[name][0] != stage_shard.index
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

    def held_parameters(self) -> dict[str, LocalShard]:
        """The pieces of parameters that this rank holds, by their names in the model."""
        self._lay_down()
        copies: dict[str, list[nn.Parameter]] = {}
        for stage_shard in self._chunks:
            for name, held in stage_shard.names.items():
                copies.setdefault(name, []).append(self.get_parameter(held))
        return {
            name: LocalShard(
                self._blueprint.parameters[name].shape, held_index(self._blueprint, name, self._coordinates), tuple(held)
            )
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
        return memory_by_role(self._chunks, self.device, optimizer, self._passes.stashed)

    def save_pretrained(self, path: str | Path, max_shard_size: int = 5 * 1024**3, strict: bool = True) -> None:
        """Write a HuggingFace directory (config.json, generation_config.json, safetensors) from all ranks together; no rank
        holds the whole model. max_shard_size: bytes of a file. strict: raise CheckpointError, before anything is written, where
        `from_pretrained` would not read the tensors, such as those of adapters."""
        from shardcomp.weights.huggingface import save_pretrained

        self._lay_down()
        parts = {name: plan.part for name, plan in self._blueprint.parameters.items()}
        names = {**group_by_packed(parts), **{name: [name] for name in self._blueprint.persistent_buffers}}
        if not getattr(self.config, "tie_word_embeddings", True):
            # Tied by hand: the configuration will not tie them when the files are read.
            names |= {alias: [alias] for plan in self._blueprint.parameters.values() for alias in plan.aliases}
        if strict:
            self._origin.check_names(names, [alias for plan in self._blueprint.parameters.values() for alias in plan.aliases])
        entries = []
        for name, pieces in names.items():
            shape, dtype = self._shape(pieces[0])
            part = parts.get(pieces[0])
            fetch = self._fetcher(name, {piece: parts.get(piece) for piece in pieces})
            entries.append((name, part.shape if part else shape, dtype, fetch))
        writer = torch.distributed.get_rank() == 0
        save_pretrained(path, entries, self.config, writer, max_shard_size, self.generation_config)
        torch.distributed.barrier()  # the directory is there for whoever goes on

    def _fetcher(self, name: str, parts: Mapping[str, PackedSlice | None]) -> Callable[[], Tensor]:
        """The collective call that returns a tensor whole, a packed one of its pieces."""

        def whole(piece: str) -> Tensor:
            held = self._get(piece)
            return self._from_its_stage(piece, held if held is None else together(held.detach())).cpu()

        if name in parts:
            return lambda: whole(name)
        return lambda: assemble(name, parts, {piece: whole(piece) for piece in parts})

    def _get(self, name: str) -> Tensor | None:
        """A parameter or buffer by its name, or by another name of a tied one; None where only other pipeline ranks have it."""
        first = self._first_name(name)
        held = next((stage_shard.names[first] for stage_shard in self._chunks if first in stage_shard.names), first)
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

    def _agree_on(
        self,
        call: str,
        micro_batches: list[dict[str, Tensor]],
        outputs: tuple[str, ...],
        axes: tuple[str, ...],
        counts: bool,
        whole: Mapping[str, Tensor] | None = None,
    ) -> tuple[LoadedCall, Agreed]:
        """The code of a call, and what the ranks know of it together. counts: whether labels are counted. whole: the batch that
        `micro_batches` are of."""
        code, batch = self._calls.of(micro_batches[0], outputs, self._mode), micro_batches[0] if whole is None else whole
        bounds = {name: bound for name, bound in code.blueprint.index_bounds.items() if name in batch}
        floating = [name for name in bounds if batch[name].is_floating_point()]
        if floating:
            raise PlanError(f"{call}: {', '.join(floating)} is {batch[floating[0]].dtype}: tokens and labels are integers")
        tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        if counts:
            with torch.no_grad():
                counted = [
                    code.stages[0].tokens(**{name: micro_batch[name] for name in code.blueprint.token_inputs})
                    for micro_batch in micro_batches
                ]
                tokens = torch.stack(counted).sum()
        digest, changed = self._trained.look()
        mode = f"{call} -> ({', '.join(outputs)}), {'training' if self.training else 'evaluating'},"
        agreed = self._agreement.exchange(mode, batch, bounds, axes, tokens, len(micro_batches), digest, changed)
        if agreed.changed:
            self._calls.trained = self._trained.grow((self._axes[name] for name in axes), self.device)
            code = self._calls.of(micro_batches[0], outputs, self._mode)
        return code, agreed


def _told_to_hosts(blueprint: Blueprint) -> list[str]:
    """The axes along which an accelerator's host must know of the others before a step starts: how many micro-batches they
    have, where these are exchanged one by one, and whether another stage trains more than before."""
    uneven = ["dp"] if blueprint.zero >= 2 and blueprint.micro_batch is not None else []
    return uneven + (["pp"] if blueprint.mesh.pp > 1 else [])


def _check_return_logits(value: object) -> None:
    if not isinstance(value, bool) and value != "whole":
        raise PlanError(f'return_logits = {value!r}: use True, False, or "whole" for logits that are not split')


def _is_split(parameter: Tensor) -> bool:
    """Whether a parameter has a part of it on each of several ranks."""
    if not isinstance(parameter, DTensor):
        return False
    sizes = parameter.device_mesh.shape
    return any(size > 1 and not at.is_replicate() for size, at in zip(sizes, parameter.placements, strict=True))
