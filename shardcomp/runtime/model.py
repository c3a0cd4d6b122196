"""The sharded model that a user holds: HuggingFace's names, DTensor parameters, `train_step`, and the pieces of it that are
built from a blueprint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardcomp.collectives import allreduce_identity
from shardcomp.errors import PlanError
from shardcomp.mesh import FACTORS, Mesh
from shardcomp.parts import Part, join, packed
from shardcomp.runtime import world
from shardcomp.runtime.blueprint import COMPUTE, MASTER, Blueprint, ParameterPlan
from shardcomp.runtime.gradients import PartialGradients, around_backward, clip_grad_norm
from shardcomp.runtime.random import Streams
from shardcomp.runtime.unit import Home, Root, Stage

Weights = Callable[[str, tuple[slice, ...]], Tensor]
"""(parameter name, which part) -> that part, in any dtype, on any device."""
Call = tuple[tuple[tuple[str, int], ...], tuple[str, ...], bool]
"""A call signature: the inputs given as (name, dimensions), the outputs wanted, training or not."""
Lower = Callable[[Call, tuple[int, int]], Blueprint]
"""Lowers a call of a given (batch, length), which matters only for models with static shapes."""


@dataclass(frozen=True)
class StepResult:
    """What a training step tells: the mean loss over the labels that count in the global batch, and how many those are.

    Both are the same on every rank: a 0-d tensor each.
    """

    loss: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _Loaded:
    """The code of one call signature, and the parameters whose gradient it leaves partial."""

    blueprint: Blueprint
    stage: Stage
    partial: PartialGradients


class ShardedModel(nn.Module):
    """One rank's part of a model.

    Parameters have their HuggingFace names and are DTensors; `mesh` is the `DeviceMesh` with the axes pp, dp, cp, tp. A batch
    is this data-parallel rank's samples, the same on every rank of one tensor-parallel group. `random` is what dropout draws
    from: the same seed, mesh and sequence of calls give the same numbers, and torch's own generators are left alone.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        tree: nn.Module,
        homes: list[Home],
        root: Root,
        mesh: DeviceMesh,
        device: torch.device,
        config: Any = None,
        lower: Lower | None = None,
        factored: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        # Not children: their parameters are those of the tree, under other names.
        object.__setattr__(self, "_homes", homes)
        object.__setattr__(self, "_root", root)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.config = config
        self.mesh = mesh
        self.device = device
        self._axes = world.axes_of(mesh, factored or mesh)
        self._unit_axes = dict(self._axes)
        coordinates = {name: axis.rank for name, axis in self._axes.items()}
        self.random = Streams(blueprint.seed, blueprint.mesh, coordinates, device)
        self._lower = lower
        self._blueprint = blueprint
        self._stages: dict[tuple[Call, tuple[int, int] | None], _Loaded] = {}
        self._partials: dict[tuple[tuple[str, tuple[str, ...]], ...], PartialGradients] = {}

    def forward(self, num_items_in_batch: Tensor | int | None = None, return_logits: bool = False, **batch: Tensor) -> Any:
        """The model's own output type. `loss`, where labels are given, is the mean over all labels that count in the global
        batch, or over `num_items_in_batch`; `logits`, where no labels are given or `return_logits`, is a DTensor that is split
        on the vocabulary."""
        self._check(batch)
        labelled = "labels" in batch
        outputs = (("loss",) if labelled else ()) + (("logits",) if return_logits or not labelled else ())
        code = self._code(batch, outputs)
        inputs = dict(batch)
        if labelled:
            count = self._tokens(code, batch) if num_items_in_batch is None else num_items_in_batch
            inputs["num_items_in_batch"] = torch.as_tensor(count, device=self.device)
        found = self._root(code.stage.forward, **inputs)
        if not torch.is_grad_enabled():
            self._lay_down()
        if "loss" in found:
            found["loss"] = around_backward(found["loss"], code.partial.set_aside, code.partial.add_up)
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
        for module in (*self._homes, self._root):
            if isinstance(module, FSDPModule):
                module.reshard()

    def train_step(self, **batch: Tensor) -> StepResult:
        """Forward and backward of all micro-batches. Gradients are those of the loss it returns, summed over data-parallel
        ranks, and add to gradients that stand."""
        self._check(batch)
        if "labels" not in batch:
            raise PlanError("train_step: no labels; give labels=, with -100 where a token does not count")
        pieces = self._micro_batches(batch)
        code = self._code(pieces[0], ("loss",))
        tokens = self._tokens(code, *pieces)
        code.partial.set_aside()
        try:
            losses = [self._backward(code, piece, tokens, last=piece is pieces[-1]) for piece in pieces]
            code.partial.add_up()
        except BaseException:
            code.partial.forget()
            raise
        return StepResult(self._axes["dp"].all_reduce(torch.stack(losses).sum()), tokens)

    def _backward(self, code: _Loaded, piece: Mapping[str, Tensor], tokens: Tensor, last: bool) -> Tensor:
        """Forward and backward of one micro-batch; the last also sums the gradients over dp. Returns its part of the loss."""
        self._root.set_requires_gradient_sync(last)
        loss = self._root(code.stage.forward, **piece, num_items_in_batch=tokens)["loss"]
        loss.backward()
        return loss.detach()

    def _micro_batches(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        rows = next(iter(batch.values())).shape[0]
        size = self._blueprint.micro_batch or rows
        if rows % size:
            legal = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            raise PlanError(f"train_step: a batch of {rows} does not split into micro-batches of {size}: use {legal}")
        return [{name: held[at : at + size] for name, held in batch.items()} for at in range(0, rows, size)]

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global 2-norm of at most `max_norm`, over every axis; returns the norm before."""
        return clip_grad_norm(self.parameters(), max_norm, self._axes)

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
            part, held = parts.get(pieces[0]), self._get(pieces[0])
            entries.append(
                (
                    name,
                    part.shape if part else tuple(held.shape),
                    held.dtype,
                    self._fetcher(name, {piece: parts.get(piece) for piece in pieces}),
                )
            )
        writer = torch.distributed.get_rank() == 0
        save_pretrained(path, entries, self.config, is_writer=writer, max_shard_size=max_shard_size)
        torch.distributed.barrier()  # the directory is there for whoever goes on

    def _fetcher(self, name: str, parts: Mapping[str, Part | None]) -> Callable[[], Tensor]:
        """The collective call that returns a tensor whole, a packed one of its pieces."""

        def whole(piece: str) -> Tensor:
            held = self._get(piece).detach()
            return (held.full_tensor() if isinstance(held, DTensor) else held).cpu()

        if name in parts:
            return lambda: whole(name)
        return lambda: join(name, parts, {piece: whole(piece) for piece in parts})

    def _get(self, name: str) -> Any:
        """A parameter or buffer, also by another name of a tied one."""
        first = {alias: known for known, plan in self._blueprint.parameters.items() for alias in plan.aliases}
        path, _, leaf = first.get(name, name).rpartition(".")
        return getattr(self.get_submodule(path), leaf)

    def _tokens(self, code: _Loaded, *pieces: Mapping[str, Tensor]) -> Tensor:
        """The labels of the global batch that the loss is a mean over."""
        with torch.no_grad():
            mine = [code.stage.tokens(**{name: piece[name] for name in code.blueprint.token_inputs}) for piece in pieces]
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

    def _code(self, batch: Mapping[str, Tensor], outputs: tuple[str, ...]) -> _Loaded:
        """The code for a call: lowered when its signature, or for a model with static shapes its shape, is first met."""
        call: Call = (tuple(sorted((name, held.dim()) for name, held in batch.items())), outputs, self.training)
        rows, length = next(iter(batch.values())).shape[:2]
        for shape in (None, (rows, length)):
            if (call, shape) in self._stages:
                return self._stages[call, shape]
        blueprint = self._blueprint_for(call, (rows, length))
        stage = blueprint.module().Model(self._homes, self._unit_axes, self.device, self.random)
        self._stages[call, blueprint.static_shape] = loaded = _Loaded(blueprint, stage, self._partial_gradients(blueprint))
        return loaded

    def _partial_gradients(self, blueprint: Blueprint) -> PartialGradients:
        """One for all calls that leave the same gradients partial, so that a backward through two of them adds up once."""
        left = tuple((name, plan.partial_gradient) for name, plan in blueprint.parameters.items() if plan.partial_gradient)
        if left not in self._partials:
            self._lay_down()
            self._partials[left] = PartialGradients([(self._get(name), axes) for name, axes in left], self._axes)
        return self._partials[left]

    def _blueprint_for(self, call: Call, shape: tuple[int, int]) -> Blueprint:
        inputs, outputs, training = call
        mine = self._blueprint
        same = (tuple(sorted(mine.inputs)), mine.outputs, mine.training) == (tuple(n for n, _ in inputs), outputs, training)
        if same and mine.static_shape in (None, shape):
            return mine
        if self._lower is None:
            asked = f"({', '.join(name for name, _ in inputs)}) -> ({', '.join(outputs)}), training = {training}, shape {shape}"
            has = f"({', '.join(mine.inputs)}) -> ({', '.join(mine.outputs)}), training = {mine.training}"
            raise PlanError(f"this source was written for {has}, shape {mine.static_shape or 'any'}; the call is {asked}")
        return self._lower(call, shape)


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
    """Allocate this rank's part of a lowered model and hand it over. `weights` is asked for the local part of each
    parameter."""
    mesh, device = world.start(blueprint.mesh)
    factored = blueprint.mesh.factored_mesh(mesh)
    beside_copies = _beside_copies(blueprint)
    coordinates = {name: axis.rank for name, axis in world.axes_of(mesh).items()}
    tree = nn.Module()
    for name, plan in blueprint.parameters.items():
        index = local_index(plan, blueprint.mesh, coordinates)
        held = weights(name, index).to(device=device, dtype=MASTER[blueprint.precision], copy=True)
        path, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(
            _distribute(held, plan, factored if name in beside_copies else mesh), requires_grad=plan.requires_grad
        )
        _descend(tree, path).register_parameter(leaf, parameter)
    for name, buffer in blueprint.buffers.items():
        path, _, leaf = name.rpartition(".")
        _descend(tree, path).register_buffer(leaf, buffer.to(device), persistent=name in blueprint.persistent_buffers)
    homes, root = _homes(blueprint, tree)
    _replicate(blueprint, homes, root, mesh, factored)
    return ShardedModel(blueprint, tree, homes, root, mesh, device, config, lower, factored)


def local_index(plan: ParameterPlan, mesh: Mesh, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
    """Which part of a parameter the rank at `coordinates` holds."""
    index = [slice(0, size) for size in plan.shape]
    for axis, dim in plan.split.items():
        size = plan.shape[dim]
        placement = plan.layout.on(axis)
        step, at = -(-size // (mesh.size(axis) // placement.copies)), coordinates[axis] // placement.copies
        index[dim] = slice(min(size, at * step), min(size, (at + 1) * step))
    return tuple(index)


def _distribute(held: Tensor, plan: ParameterPlan, mesh: DeviceMesh) -> DTensor:
    """A parameter on tp, or on its two factors: then a piece lies along the first and is copied along the second."""
    cut = Shard(plan.split["tp"]) if "tp" in plan.split else Replicate()
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        axes, placements = mesh["tp"], [cut]
    else:
        axes, placements = mesh[FACTORS], [cut, cut if plan.copies == 1 else Replicate()]
    stride = torch.empty(plan.shape, device="meta").stride()
    return DTensor.from_local(held.contiguous(), axes, placements, run_check=False, shape=torch.Size(plan.shape), stride=stride)


def _descend(tree: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made on the way where it is not there."""
    for part in path.split(".") if path else []:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    return tree


def _homes(blueprint: Blueprint, tree: nn.Module) -> tuple[list[Home], Root]:
    """A home for each unit. A module whose parameters several units use, such as a tied embedding, belongs to the root."""
    users: dict[str, set[int]] = {}
    for index, unit in enumerate(blueprint.units):
        for name in unit.parameters.values():
            users.setdefault(name.rpartition(".")[0], set()).add(index)
    homes = []
    for unit in blueprint.units:
        names = {**unit.parameters, **unit.buffers}
        places = {short: (tree.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for short, n in names.items()}
        owned = dict.fromkeys(n.rpartition(".")[0] for n in unit.parameters.values())
        homes.append(Home(places, [tree.get_submodule(path) for path in owned if len(users[path]) == 1]))
    shared = [tree.get_submodule(path) for path, indices in users.items() if len(indices) > 1]
    return homes, Root(homes, shared)


def _beside_copies(blueprint: Blueprint) -> set[str]:
    """The parameters of the units that hold some in copies: one unit's parameters lie on one mesh."""
    users: dict[str, set[int]] = {}
    for index, unit in enumerate(blueprint.units):
        for name in unit.parameters.values():
            users.setdefault(name.rpartition(".")[0], set()).add(index)
    own = [[n for n in unit.parameters.values() if len(users[n.rpartition(".")[0]]) == 1] for unit in blueprint.units]
    return {name for names in own if any(blueprint.parameters[n].copies > 1 for n in names) for name in names}


def _replicate(blueprint: Blueprint, homes: Iterable[Home], root: Root, mesh: DeviceMesh, factored: DeviceMesh | None) -> None:
    """Data parallelism: parameters copied over dp, cast to the compute dtype for each forward, gradients summed over dp in the
    masters' dtype."""
    compute, master = COMPUTE[blueprint.precision], MASTER[blueprint.precision]
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    modules: list[nn.Module] = [home for home in homes if any(True for _ in home.parameters())]
    for module in (*modules, root):
        own = [] if module is root else [p for p in module.parameters() if isinstance(p, DTensor)]
        in_factors = any(FACTORS[0] in (p.device_mesh.mesh_dim_names or ()) for p in own)
        replicate(module, mesh=(factored if in_factors and factored else mesh)["dp"], mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
