"""The sharded model that training code holds: HuggingFace's names, DTensor parameters, `train_step`, `eval_step` and
`optimizer_step`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.runtime import world
from shardcomp.runtime.agreed_calls import AgreedCalls
from shardcomp.runtime.agreement import Agreement
from shardcomp.runtime.allocation import shard_index, users
from shardcomp.runtime.backward import BackwardPasses
from shardcomp.runtime.blueprint import MASTER, Blueprint
from shardcomp.runtime.call_cache import CallCache, Lower
from shardcomp.runtime.direct_call import CALL, DirectCalls
from shardcomp.runtime.fsdp import named_parameters, reshard
from shardcomp.runtime.full_tensors import FullTensors
from shardcomp.runtime.gradients import coefficient, global_norm, scale_gradients
from shardcomp.runtime.guard import CallGuard
from shardcomp.runtime.hooks import DenseShard, ParameterHooks
from shardcomp.runtime.inputs import named_inputs
from shardcomp.runtime.loss_scale import LossScale
from shardcomp.runtime.memory import memory_by_role
from shardcomp.runtime.module_contract import Namespace, SealedModule, refuse
from shardcomp.runtime.optimizer_step import checked, step_unless_bad
from shardcomp.runtime.origin import Origin
from shardcomp.runtime.random import Streams
from shardcomp.runtime.stage_shard import LocalShard, StageShard
from shardcomp.runtime.steps import StepResult as StepResult
from shardcomp.runtime.steps import Steps


class ShardedModel(SealedModule):
    """One rank's part of a model, from `shardcomp.shard`.

    Parameters are DTensors with their HuggingFace names; a pipeline's rank has only its stages' parameters. A batch is this
    data-parallel rank's samples, the same on every rank of one pp and tp group. What training code does to a plain module works
    as it does there, or raises PlanError: `docs/module_contract.md`.

    Attributes:
        mesh: the `DeviceMesh` with the axes pp, dp, cp, tp.
        device: this rank's device.
        config: HuggingFace's configuration of the dense model.
        random: what dropout draws from. The same seed, mesh and sequence of calls give the same numbers. torch's own generators
            are not touched.
        loss_scale: the loss scale of fp16.
        skipped_steps: how many optimizer steps were skipped because a gradient was not finite.
        training: the mode of the dense model, until `train` or `eval`.

    Example:
        >>> step = sharded.train_step(input_ids=ids, labels=ids)
        >>> sharded.optimizer_step(optimizer, max_norm=1.0)
        True
        >>> sharded.zero_grad()
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
        # No child: the tree has the same parameters, under other names.
        object.__setattr__(self, "_stage_shards", stage_shards)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in blueprint.persistent_buffers)
        self.config, self.generation_config = origin.config, origin.generation_config
        self.mesh, self.device = mesh, device
        self._origin, self._blueprint, self._axes = origin, blueprint, axes
        self._coordinates = {name: axis.rank for name, axis in axes.items()}
        self.random = Streams(blueprint.seed, blueprint.mesh, self._coordinates, device)
        self.loss_scale = LossScale(enabled=blueprint.precision == "fp16")
        self.skipped_steps = 0
        self._users = users(blueprint)
        self._calls = CallCache(self, blueprint, stage_shards, axes, tied, device, self.random, lower)
        self._named = [entry for stage_shard in stage_shards for entry in named_parameters(stage_shard)]
        self._passes = passes = BackwardPasses(stage_shards, self._scale, self._hooks(), device)
        on_cpu = device.type == "cpu"
        host = {} if on_cpu else world.host_axes(mesh, _exchanged_by_hosts(blueprint))
        self._agreement = Agreement(axes, device, blueprint.compare_ranks, at_once=on_cpu, host=host)
        self._agreed = agreed = AgreedCalls(
            blueprint, self._calls, self._agreement, axes, device, self._named, origin.mode, origin.training
        )
        self._guard = guard = CallGuard(blueprint, stage_shards, axes, device, self.random, passes)
        self._steps = Steps(blueprint, stage_shards, mesh, axes, device, agreed, passes, guard, self._scale)
        self._direct = DirectCalls(
            blueprint,
            stage_shards,
            mesh,
            axes,
            device,
            self._named,
            agreed,
            self._agreement,
            passes,
            guard,
            self._steps,
            self._scale,
        )
        self._full = FullTensors(self, blueprint, stage_shards, axes, self._users, device)
        for module in self.children():
            if isinstance(module, Namespace):
                module.seal(self._reshard)
        self._set_training(origin.training)
        self._sealed = True

    def _scale(self) -> float:
        return self.loss_scale.scale

    def _hooks(self) -> ParameterHooks:
        """The hooks on this rank's parameters, and those that the dense model's had."""
        shards: dict[str, list[DenseShard]] = {}
        copies: dict[str, list[nn.Parameter]] = {}
        for name, entry in self._named:
            copies.setdefault(name, []).append(entry.sharded_param)
        for name, same in copies.items():
            part = self._blueprint.parameters[name].part
            index = shard_index(self._blueprint, name, self._coordinates)
            shards.setdefault(part.of if part else name, []).append(DenseShard(name, tuple(same), part, index))
        return ParameterHooks([p for same in copies.values() for p in same], self._origin.hooks, shards)

    def train(self, mode: bool = True) -> ShardedModel:
        """Set the mode of the whole model.

        Args:
            mode: whether to train: False evaluates, without dropout.

        Returns:
            The model itself.

        Example:
            >>> sharded.train(False).training
            False
            >>> sharded.train().training
            True
        """
        self._agreed.mode = mode
        self._set_training(mode)
        return self

    def _set_training(self, mode: bool) -> None:
        self.training = self._agreed.training = mode
        for module in self.children():
            if isinstance(module, Namespace):
                module.set_mode(mode)

    def forward(
        self, *args: Any, num_items_in_batch: Tensor | int | None = None, return_logits: bool | str = False, **batch: Any
    ) -> Any:
        """Call the model on this data-parallel rank's samples.

        Whatever is computed from the outputs, `.backward()` leaves the dense model's gradients, summed over dp.

        Args:
            args: what the dense model takes by position.
            num_items_in_batch: what the loss is divided by, instead of the number of labels of the global batch that count.
            return_logits: whether to return logits beside a loss; "whole" gathers them where tensor parallelism splits them.
            batch: tensors [b, s], such as `input_ids` int64.

        Returns:
            The model's own output type. `loss`, where there are labels, is [], the mean over all labels of the global batch
            that count, the same on every rank. `logits`, where there are no labels or `return_logits`, are [b, s, v]: a DTensor
            where tensor parallelism splits the vocabulary, else a plain tensor. Both have `full_tensor()`.

        Raises:
            PlanError: under a pipeline, whose micro-batches `train_step` and `eval_step` run; for a call that cannot be made.
            BatchError: for a token or label outside of the vocabulary.

        Example:
            >>> logits = sharded(input_ids=ids).logits.full_tensor()
            >>> logits.shape[:2] == ids.shape
            True
            >>> logits.float().logsumexp(-1).mean().backward()
        """
        if self._blueprint.mesh.pp > 1:
            raise PlanError("a pipeline runs whole steps: call train_step(...) to train, eval_step(...) to evaluate")
        _check_return_logits(return_logits)
        inputs = named_inputs(CALL, args, batch, self._blueprint, self.device)
        with self._guard.running(CALL, inputs):
            return self._direct.run(inputs, num_items_in_batch, return_logits)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch has it: the sharded parameters, which an optimizer updates.

        Example:
            >>> len(dict(sharded.named_parameters())) == len(dict(model.named_parameters()))
            True
        """
        self._reshard()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch has it: this rank's DTensors under HuggingFace's names, and the persistent buffers.

        Example:
            >>> state = sharded.state_dict()
            >>> sharded.load_state_dict(state)
            <All keys matched successfully>
        """
        self._reshard()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch has it, but `assign` copies numbers as well, so that optimizers keep their parameters."""
        self._reshard()
        return super().load_state_dict(state_dict, strict=strict, assign=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also the gradients of a backward that ended in an exception."""
        self._passes.recover()
        super().zero_grad(set_to_none)

    def _reshard(self) -> None:
        """Put the sharded parameters back where a forward without a backward left gathered copies."""
        for stage_shard in self._stage_shards:
            reshard(stage_shard)

    def _refuse_hooks(self, call: str) -> None:
        if self._forward_hooks or self._forward_pre_hooks:
            refuse(f"{call} with forward hooks on the sharded model", f"they are called by {CALL}; remove them")

    def train_step(self, **batch: Any) -> StepResult:
        """Run the forward and backward of all micro-batches of a batch, on any topology.

        Gradients belong to the returned loss, summed over data-parallel ranks. They add to existing gradients, so two
        steps without `zero_grad` accumulate. Data-parallel ranks may have different numbers of samples, none included.

        A batch that is refused, such as one with a token outside of the vocabulary, changes nothing. A step that fails on every
        rank drops all gradients, and the next step works. Where ranks wait for one that failed, or under a pipeline, whose
        stages are at different micro-batches, training resumes from a checkpoint.

        Args:
            batch: this rank's samples, tensors [b, s]: `labels` int64, -100 where a token does not count, and what the model
                takes.

        Returns:
            The loss and the number of labels, see `StepResult`.

        Raises:
            PlanError: for a call that cannot be made, and where ranks of one pp and tp group have different batches.
            BatchError: for a token or label outside of the vocabulary.

        Example:
            >>> step = sharded.train_step(input_ids=ids, labels=ids)
            >>> int(step.tokens) == ids.shape[0] * (ids.shape[1] - 1)
            True
        """
        inputs = named_inputs("train_step", (), batch, self._blueprint, self.device)
        self._refuse_hooks("train_step")
        with self._guard.running("train_step", inputs, training=True):
            return self._steps.train(inputs)

    def eval_step(self, return_logits: bool | str = False, **batch: Any) -> StepResult:
        """Run the forward of all micro-batches without gradients, through the same stages as `train_step`.

        The mode is the model's own: call `sharded.eval()` first to evaluate without dropout.

        Args:
            return_logits: as in a call of the model.
            batch: as in `train_step`.

        Returns:
            The loss, the number of labels and the logits, see `StepResult`.

        Raises:
            PlanError, BatchError: as `train_step` does.

        Example:
            >>> bool(sharded.eval_step(input_ids=ids, labels=ids).loss > 0)
            True
        """
        _check_return_logits(return_logits)
        inputs = named_inputs("eval_step", (), batch, self._blueprint, self.device)
        self._refuse_hooks("eval_step")
        with self._guard.running("eval_step", inputs), torch.no_grad():
            return self._steps.evaluate(inputs, return_logits)

    def optimizer_step(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None, max_norm: float = math.inf) -> bool:
        """Clip the gradients and run `optimizer.step()`, unless a gradient since the last call is not finite.

        A skipped step changes no weight on any rank. The loss scale of fp16 adapts either way. `shardcomp.AdamW` clips while it
        updates: the gradients stay as they are, and the update is under way before the host waits for anything.

        Args:
            optimizer: one of this model's parameters.
            norm: [], what `grad_norm` returned, where it was called already.
            max_norm: the global 2-norm that gradients are clipped to.

        Returns:
            Whether the step was made.

        Raises:
            PlanError: for torch's Adafactor where a parameter is sharded: it would take one shard for the parameter.

        Example:
            >>> step = sharded.train_step(input_ids=ids, labels=ids)
            >>> sharded.optimizer_step(optimizer, max_norm=1.0), sharded.skipped_steps
            (True, 0)
        """
        with checked(optimizer, self.parameters, self._guard.where):
            self._passes.recover()
            if norm is None and max_norm != math.inf:
                norm = self.grad_norm()
            bad, self._steps.bad = self._steps.bad, None
            skipped = step_unless_bad(optimizer, self.parameters, norm, max_norm, bad, self.device)
            self.loss_scale.update(skipped)
            self.skipped_steps += skipped
            if skipped:
                self._agreement.poll(wait=True)  # the host has waited already: say now if a batch was why
            return not skipped

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the gradients over every axis and stage, tied weights counted once.

        Returns:
            [], in the masters' dtype, the same on every rank; not finite where a gradient is not. The host does not wait.

        Example:
            >>> step = sharded.train_step(input_ids=ids, labels=ids)
            >>> bool(sharded.grad_norm() > 0)
            True
        """
        self._reshard()
        counted_elsewhere = [
            self.get_parameter(stage_shard.names[name])
            for stage_shard in self._stage_shards
            for name in stage_shard.names
            if self._users[name][0] != stage_shard.index
        ]
        master = MASTER[self._blueprint.precision]
        return global_norm(self.parameters(), self._axes, self.device, master, counted_elsewhere)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global 2-norm of at most `max_norm`.

        Args:
            max_norm: the largest norm, over every axis and stage.

        Returns:
            [], the norm before.

        Example:
            >>> step = sharded.train_step(input_ids=ids, labels=ids)
            >>> norm = sharded.clip_grad_norm_(1.0)
        """
        norm = self.grad_norm()
        scale_gradients(self.parameters(), coefficient(norm, max_norm))
        return norm

    @property
    def blueprint(self) -> Blueprint:
        """What this model was lowered to."""
        return self._blueprint

    def local_shards(self) -> dict[str, LocalShard]:
        """This rank's shards of parameters, by their names in the model."""
        self._reshard()
        copies: dict[str, list[nn.Parameter]] = {}
        for stage_shard in self._stage_shards:
            for name, local_name in stage_shard.names.items():
                copies.setdefault(name, []).append(self.get_parameter(local_name))
        return {
            name: LocalShard(
                self._blueprint.parameters[name].shape, shard_index(self._blueprint, name, self._coordinates), tuple(params)
            )
            for name, params in copies.items()
        }

    def local_buffers(self) -> dict[str, Tensor]:
        """This rank's persistent buffers. Buffers are replicated."""
        buffers = {name: self._full.local(name) for name in self._blueprint.persistent_buffers}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def held_bytes(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, dict[str, int]]:
        """The memory of this rank now, without activations.

        Args:
            optimizer: whose states to count.

        Returns:
            "device" or "host" -> role -> bytes. The roles: "parameters" (shards), "gathered" (copies in the compute dtype),
            "unreduced" (gradients before they are reduced over dp), "gradients", "optimizer" (its states).

        Example:
            >>> sharded.held_bytes(optimizer)["device"]["parameters"] > 0
            True
        """
        return memory_by_role(self._stage_shards, self.device, optimizer, self._passes.stashed)

    def save_pretrained(self, path: str | Path, max_shard_size: int = 5 * 1024**3, strict: bool = True) -> None:
        """Write a HuggingFace directory: config.json, generation_config.json, safetensors.

        All ranks call it together. No rank has the whole model in memory.

        Args:
            path: the directory.
            max_shard_size: bytes of a file.
            strict: whether to refuse tensors that `from_pretrained` would not read, such as an adapter's tensors.

        Raises:
            CheckpointError: where `strict` refuses, before anything is written; where the directory cannot be written.

        Example:
            >>> sharded.save_pretrained(folder / "model")
            >>> (folder / "model" / "config.json").exists()
            True
        """
        from shardcomp.weights.huggingface import save_pretrained

        self._reshard()
        # Weights tied by hand: the configuration will not tie them again when the files are read.
        with_aliases = not getattr(self.config, "tie_word_embeddings", True)
        names = self._full.names(with_aliases)
        if strict:
            self._origin.check_names(names, self._full.aliases)
        writer = torch.distributed.get_rank() == 0
        entries = self._full.entries(names)
        save_pretrained(path, entries, self.config, writer, max_shard_size, self.generation_config)
        torch.distributed.barrier()  # afterwards every rank can read the directory


def _exchanged_by_hosts(blueprint: Blueprint) -> list[str]:
    """The axes along which an accelerator's host must hear from the others before a step: how many micro-batches they have,
    where each one has collectives over dp, and whether another stage trains more than before."""
    uneven = ["dp"] if blueprint.zero >= 2 and blueprint.micro_batch is not None else []
    return uneven + (["pp"] if blueprint.mesh.pp > 1 else [])


def _check_return_logits(value: object) -> None:
    if not isinstance(value, bool) and value != "whole":
        raise PlanError(f'return_logits = {value!r}: use True, False, or "whole" for logits that are not split')
