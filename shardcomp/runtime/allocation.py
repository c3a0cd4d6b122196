"""One rank's part of a lowered model: its parameters as DTensors, and FSDP around the units of its stages.

Parameters start on meta. FSDP shards them there, and only then do the shards get memory and numbers, so no rank ever needs
memory for more than its own shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardcomp.ir.collectives import Axis
from shardcomp.ir.mesh import FACTORS, SHARDING, Mesh
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.blueprint import COMPUTE, MASTER, Blueprint, ParameterPlan, UnitPlan
from shardcomp.runtime.module_contract import Namespace
from shardcomp.runtime.stage_shard import StageShard
from shardcomp.runtime.unit import SharedParameters, StageRoot, UnitParameters
from shardcomp.torch_private import replicate

Weights = Callable[[str, tuple[slice, ...]], Tensor]
"""(parameter name, slice of it) -> that slice, in any dtype, on any device."""


def users(blueprint: Blueprint) -> dict[str, list[int]]:
    """The stages that use each parameter, in order."""
    stages_by_name: dict[str, dict[int, None]] = {}
    for unit in blueprint.units:
        for name in unit.parameters.values():
            stages_by_name.setdefault(name, {})[unit.stage] = None
    return {name: list(stages) for name, stages in stages_by_name.items()}


def stages_of(blueprint: Blueprint, rank: int) -> list[int]:
    """The stages of a pipeline rank, in the order of the model."""
    return SCHEDULES[blueprint.schedule].stages_of(rank, blueprint.mesh.pp, len(blueprint.sources))


def allocate(
    blueprint: Blueprint,
    weights: Weights,
    mesh: DeviceMesh,
    factored: DeviceMesh,
    coordinates: Mapping[str, int],
    device: torch.device,
) -> tuple[nn.Module, list[StageShard]]:
    """Make the tree of modules that has this rank's parameters and buffers under their names, and a shard of each stage.

    mesh, factored: the meshes of parameters. In the second, tp is two axes; it is for units that have parameters with copies.
    """
    tree = nn.Module()
    stage_shards: list[StageShard] = []
    model_names: dict[str, str] = {}  # a parameter's name on this rank -> its name in the model
    taken: set[str] = set()
    for stage in stages_of(blueprint, coordinates["pp"]):
        units = tuple(unit for unit in blueprint.units if unit.stage == stage)
        used = dict.fromkeys(name for unit in units for name in unit.parameters.values())
        names = {name: _free_name(name, blueprint.parameters[name], taken) for name in used}
        taken |= {name.rpartition(".")[0] for name in names.values()}
        beside_copies = _beside_copies(blueprint, units)
        for name, local_name in names.items():
            plan = blueprint.parameters[name]
            place = factored if name in beside_copies else mesh
            path, _, leaf = local_name.rpartition(".")
            parameter = _distribute(plan, blueprint.mesh, coordinates, place, MASTER[blueprint.precision])
            _descend(tree, path).register_parameter(leaf, nn.Parameter(parameter, requires_grad=plan.requires_grad))
            model_names[local_name] = name
        for buffer in {name for unit in units for name in unit.buffers.values()}:
            path, _, leaf = buffer.rpartition(".")
            _descend(tree, path).register_buffer(leaf, None, persistent=buffer in blueprint.persistent_buffers)
        unit_parameters, shared = _unit_parameters(tree, units, names)
        scalars = tuple(
            (tree.get_submodule(local_name.rpartition(".")[0]), local_name.rpartition(".")[2])
            for name, local_name in names.items()
            if not blueprint.parameters[name].shape
        )
        root = StageRoot(unit_parameters, shared)
        stage_shards.append(StageShard(stage, units, unit_parameters, root, names, scalars))
    for stage_shard in stage_shards:
        _apply_fsdp(blueprint, stage_shard, mesh, factored, device)
    _fill(blueprint, weights, tree, model_names, coordinates)
    _register_buffers(blueprint, tree, stage_shards, device)
    return tree, stage_shards


def _register_buffers(blueprint: Blueprint, tree: nn.Module, stage_shards: list[StageShard], device: torch.device) -> None:
    """Give the tree the buffers of its own units, and those that no unit of any stage uses."""
    used = {name for unit in blueprint.units for name in unit.buffers.values()}
    own = {name for stage_shard in stage_shards for unit in stage_shard.units for name in unit.buffers.values()}
    for name, buffer in blueprint.buffers.items():
        if name in own or name not in used:
            path, _, leaf = name.rpartition(".")
            _descend(tree, path).register_buffer(leaf, buffer.to(device), persistent=name in blueprint.persistent_buffers)


def _free_name(name: str, plan: ParameterPlan, taken: set[str]) -> str:
    """A parameter's name on this rank: its own, or another name of a tied weight where an earlier stage has the module."""
    path, _, leaf = name.rpartition(".")
    for known in (name, *plan.aliases):
        if known.rpartition(".")[0] not in taken:
            return known
    return f"{path}_again.{leaf}"


def _distribute(
    plan: ParameterPlan, mesh: Mesh, coordinates: Mapping[str, int], place: DeviceMesh, dtype: torch.dtype
) -> Tensor:
    """A parameter on meta, as a DTensor over tp, or over its two factors: sharded along the first, and where it has copies,
    replicated along the second."""
    if mesh.tp == 1 and plan.shape:
        # FSDP makes a DTensor of it, over dp: a second axis of one rank would cost Python in every step. FSDP does not take
        # scalars, so these are DTensors from the start.
        return torch.empty(plan.shape, dtype=dtype, device="meta")
    placement = Shard(plan.split["tp"]) if "tp" in plan.split else Replicate()
    if "tp" in (place.mesh_dim_names or ()):
        axes, placements = place["tp"], [placement]
    else:
        axes, placements = place[FACTORS], [placement, placement if plan.copies == 1 else Replicate()]
    shape = [range_.stop - range_.start for range_ in local_index(plan, mesh, coordinates)]
    stride = torch.empty(plan.shape, device="meta").stride()
    local = torch.empty(shape, dtype=dtype, device="meta")
    return DTensor.from_local(local, axes, placements, run_check=False, shape=torch.Size(plan.shape), stride=stride)


def local_index(plan: ParameterPlan, mesh: Mesh, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
    """The slice of a parameter that the tensor-parallel rank at `coordinates` has, before ZeRO shards it over dp."""
    index = [slice(0, size) for size in plan.shape]
    for axis, dim in plan.split.items():
        placement = plan.layout.on(axis)
        shards, at = mesh.size(axis) // placement.copies, coordinates[axis] // placement.copies
        index[dim] = _shard(index[dim], shards, at)
    return tuple(index)


def shard_index(blueprint: Blueprint, name: str, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
    """The slice of a parameter that the rank at `coordinates` has between steps: its shard over tp, and under ZeRO over dp."""
    index = list(local_index(blueprint.parameters[name], blueprint.mesh, coordinates))
    shards = blueprint.mesh.size(SHARDING[1]) if blueprint.zero else 1
    if index:
        index[0] = _shard(index[0], shards, coordinates["dp"] % shards)
    return tuple(index)


def _shard(range_: slice, shards: int, at: int) -> slice:
    """Shard number `at` of a range, as `torch.chunk` splits it: the last ones may be shorter or empty."""
    step = -(-(range_.stop - range_.start) // shards)
    return slice(min(range_.stop, range_.start + at * step), min(range_.stop, range_.start + (at + 1) * step))


def _descend(tree: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Missing ones are added on the way."""
    for part in path.split(".") if path else []:
        if part not in tree._modules:
            tree.add_module(part, Namespace())
        tree = tree.get_submodule(part)
    return tree


def _unit_parameters(
    tree: nn.Module, units: tuple[UnitPlan, ...], names: Mapping[str, str]
) -> tuple[list[UnitParameters], SharedParameters | None]:
    """The parameters of each unit of a stage, and the modules whose parameters several of them use."""
    readers = _readers(units, names)
    common = {path for path, indices in readers.items() if len(indices) > 1}
    apart = all(units[index].reshard for path in common for index in readers[path])
    shared = (
        SharedParameters([_without_children(tree.get_submodule(path)) for path in readers if path in common], apart)
        if common
        else None
    )
    unit_parameters = []
    for unit in units:
        local_names = {**{short: names[name] for short, name in unit.parameters.items()}, **unit.buffers}
        places = {short: (_descend(tree, n.rpartition(".")[0]), n.rpartition(".")[2]) for short, n in local_names.items()}
        used = dict.fromkeys(names[n].rpartition(".")[0] for n in unit.parameters.values())
        owned = [_without_children(tree.get_submodule(path)) for path in used if path not in common]
        unit_shared = shared if common & used.keys() else None
        unit_parameters.append(UnitParameters(places, owned, unit_shared, unit.path, unit.recompute))
    return unit_parameters, shared


def _without_children(module: nn.Module) -> nn.Module:
    """A module that shares the dictionary of another one's parameters, but not its children: these may belong to other
    units."""
    childless = nn.Module()
    childless._parameters = module._parameters
    return childless


def _readers(units: tuple[UnitPlan, ...], names: Mapping[str, str]) -> dict[str, set[int]]:
    """The path of a module -> the units that use its parameters. names: the names of the parameters in the tree."""
    readers: dict[str, set[int]] = {}
    for index, unit in enumerate(units):
        for name in unit.parameters.values():
            readers.setdefault(names[name].rpartition(".")[0], set()).add(index)
    return readers


def _beside_copies(blueprint: Blueprint, units: tuple[UnitPlan, ...]) -> set[str]:
    """All parameters of the units that have one with copies. FSDP wants the parameters of a unit on one mesh."""
    readers = _readers(units, {name: name for unit in units for name in unit.parameters.values()})
    own = [[n for n in unit.parameters.values() if len(readers[n.rpartition(".")[0]]) == 1] for unit in units]
    return {name for names in own if any(blueprint.parameters[n].copies > 1 for n in names) for name in names}


def _apply_fsdp(
    blueprint: Blueprint, stage_shard: StageShard, mesh: DeviceMesh, factored: DeviceMesh, device: torch.device
) -> None:
    """Data parallelism for the units of a stage, and memory for their shards.

    Parameters are sharded over dp as ZeRO says, or replicated. They are cast to the compute dtype when they are gathered, and
    gradients are reduced over dp in the masters' dtype.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE[blueprint.precision], reduce_dtype=MASTER[blueprint.precision], cast_forward_inputs=False
    )
    root, shared = stage_shard.root, stage_shard.root.shared
    pairs = list(zip(stage_shard.unit_parameters, stage_shard.units, strict=True))
    modules: list[nn.Module] = [unit_params for unit_params, unit in pairs if unit.parameters]
    for module in (*modules, shared, root) if shared and shared.apart else (*modules, root):
        # The root has no parameters but those shared ones that stay gathered from the first unit to the last.
        holder = shared if module is root and shared and not shared.apart else module
        own = [] if holder is root else list(holder.parameters())
        in_factors = any(isinstance(p, DTensor) and FACTORS[0] in (p.device_mesh.mesh_dim_names or ()) for p in own)
        data = (factored if in_factors else mesh)[SHARDING if blueprint.mesh.replicas > 1 else ("dp",)]
        on_host = bool(own) and stage_shard.offloads(module)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if on_host else OffloadPolicy()
        scalars = set(stage_shard.scalars)
        if blueprint.zero == 0:
            replicate(module, mesh=data, mp_policy=policy, offload_policy=offload, ignored_params=scalars)
        else:
            reshard = bool(own) and stage_shard.reshards(module)
            fully_shard(
                module,
                mesh=data,
                reshard_after_forward=reshard,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=scalars,
            )
        assert isinstance(module, FSDPModule)
        if data.size() > 1:  # a sum, where FSDP would take a mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if own:
            holder.to_empty(device="cpu" if on_host else device)
    splits = blueprint.mesh.pp > 1 and SCHEDULES[blueprint.schedule].splits_backward
    for unit_params, unit in pairs:
        unit_params.copies_vectors, unit_params.splits = unit.reshard and splits, splits
        unit_params.compute_dtype = COMPUTE[blueprint.precision]
    _prefetch(blueprint, stage_shard)


def _prefetch(blueprint: Blueprint, stage_shard: StageShard) -> None:
    """Gather the neighbours of a unit while it computes, in both directions, if they are resharded after forward.

    A group without a neighbour to prefetch names itself. FSDP would otherwise guess one from the order of past forwards, which
    is wrong when several micro-batches are under way.
    """
    for group in stage_shard.groups:
        group.set_modules_to_backward_prefetch([group])
    chain = [
        (unit_params, unit)
        for unit_params, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True)
        if unit.parameters and unit.reshard
    ]
    for (before, plan), (after, _) in itertools.pairwise(chain):
        before.set_modules_to_forward_prefetch(_groups_of(after))  # type: ignore[operator]
        if _passes_back(blueprint, plan):
            after.set_modules_to_backward_prefetch(_groups_of(before))  # type: ignore[operator]


def _groups_of(unit_params: UnitParameters) -> list[FSDPModule]:
    """The FSDP groups that the parameters of a unit are in."""
    return [module for module in (unit_params, unit_params.shared) if isinstance(module, FSDPModule)]


def _passes_back(blueprint: Blueprint, unit: UnitPlan) -> bool:
    """Whether a backward goes through a unit: whether it or an earlier one has a trained parameter."""
    before = blueprint.units[: blueprint.units.index(unit) + 1]
    return any(blueprint.parameters[name].requires_grad for earlier in before for name in earlier.parameters.values())


def _fill(
    blueprint: Blueprint, weights: Weights, tree: nn.Module, names: Mapping[str, str], coordinates: Mapping[str, int]
) -> None:
    """Give this rank's shards their numbers. names: a parameter's name on this rank -> its name in the model."""
    with torch.no_grad():
        for local_name, name in names.items():
            index = shard_index(blueprint, name, coordinates)
            parameter = tree.get_parameter(local_name)
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            if local.numel():
                local.copy_(weights(name, index))


def tied_axes(blueprint: Blueprint, mesh: DeviceMesh) -> dict[tuple[int, ...], Axis]:
    """The pipeline ranks that have the same tied parameter -> the axis that its gradients are summed over.

    All ranks call this together. Sets without this rank are left out.
    """
    schedule, pipeline = SCHEDULES[blueprint.schedule], blueprint.mesh.pp
    sets = {
        tuple(sorted({schedule.rank_of(stage, pipeline) for stage in stages}))
        for stages in users(blueprint).values()
        if len(stages) > 1
    }
    axes: dict[tuple[int, ...], Axis] = {}
    here = dist.get_rank()
    for ranks in sorted(members for members in sets if len(members) > 1):
        columns = mesh.mesh[list(ranks)].flatten(1).T  # one row for all ranks with the same place on the other axes
        for column in columns.tolist():
            group = dist.new_group(column)
            if here in column:
                axes[ranks] = Axis("pp", len(ranks), column.index(here), group)
    return axes
