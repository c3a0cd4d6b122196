"""One rank's part of a lowered model: its parameters as DTensors, and FSDP around the units of its stages.

Parameters are made on meta, shared out by FSDP, and only then given memory and numbers, so that no rank ever holds more than
its own piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardcomp.ir.collectives import Axis
from shardcomp.ir.mesh import FACTORS, SHARDING, Mesh
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.runtime.blueprint import COMPUTE, MASTER, Blueprint, ParameterPlan, UnitPlan
from shardcomp.runtime.module_contract import Namespace
from shardcomp.runtime.unit import SharedParameters, StageRoot, UnitParameters

Weights = Callable[[str, tuple[slice, ...]], Tensor]
"""(parameter name, which part) -> that part, in any dtype, on any device."""


@dataclass(frozen=True)
class StageShard:
    """What a rank holds of one stage: the homes of its units and the module that FSDP takes for their root.

    names: a parameter's name in the model -> its name on this rank, which is another one for the second copy of a tied weight.
    scalar_places: where its parameters of no dimension are, as (module, attribute). FSDP does not take them: every rank of dp
    has them, in the masters' dtype.
    """

    index: int
    units: tuple[UnitPlan, ...]
    unit_parameters: list[UnitParameters]
    root: StageRoot
    names: dict[str, str]
    scalar_places: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def scalars(self) -> list[nn.Parameter]:
        """The parameters of no dimension."""
        return [p for module, leaf in self.scalar_places if (p := module._parameters[leaf]) is not None]

    @property
    def groups(self) -> list[FSDPModule]:
        """The modules whose parameters FSDP gathers together, in the order of the forward, the shared ones last."""
        return [module for module in (*self.unit_parameters, self.root.shared, self.root) if isinstance(module, FSDPModule)]

    def users(self, module: nn.Module) -> list[UnitPlan]:
        """The units that use the parameters of a group."""
        module = self.root.shared if module is self.root and self.root.shared else module
        return [unit for unit, home in zip(self.units, self.unit_parameters, strict=True) if module in (home, home.shared)]

    def reshards(self, module: nn.Module) -> bool:
        """Whether a group's parameters are put back in pieces between its forward and its backward."""
        return all(unit.reshard for unit in self.users(module))

    def offloads(self, module: nn.Module) -> bool:
        """Whether the host keeps a group's parameters, gradients and optimizer states."""
        return all(unit.offload for unit in self.users(module))

    @property
    def whole_backward(self) -> bool:
        """Whether the gradients of its inputs and of its weights are computed together."""
        return any(unit.whole_backward for unit in self.units)


@dataclass(frozen=True)
class LocalShard:
    """What this rank holds of a parameter of the shape `shape`: the piece that `index` says, in `parameters`, of which there
    are two where it has both stages that use a tied weight."""

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    parameters: tuple[nn.Parameter, ...]


def users(blueprint: Blueprint) -> dict[str, list[int]]:
    """The stages that use each parameter, in order."""
    found: dict[str, dict[int, None]] = {}
    for unit in blueprint.units:
        for name in unit.parameters.values():
            found.setdefault(name, {})[unit.stage] = None
    return {name: list(stages) for name, stages in found.items()}


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
    """The tree of modules that has this rank's parameters and buffers under their names, and its stage_shards.

    mesh, factored: the meshes of parameters, the second for units that hold some in copies.
    """
    tree = nn.Module()
    stage_shards: list[StageShard] = []
    homes_of: dict[str, str] = {}  # a parameter on this rank -> its name in the model
    taken: set[str] = set()
    for stage in stages_of(blueprint, coordinates["pp"]):
        units = tuple(unit for unit in blueprint.units if unit.stage == stage)
        needed = dict.fromkeys(name for unit in units for name in unit.parameters.values())
        names = {name: _free_name(name, blueprint.parameters[name], taken) for name in needed}
        taken |= {name.rpartition(".")[0] for name in names.values()}
        beside_copies = _beside_copies(blueprint, units)
        for name, held in names.items():
            plan = blueprint.parameters[name]
            place = factored if name in beside_copies else mesh
            path, _, leaf = held.rpartition(".")
            parameter = _distribute(plan, blueprint.mesh, coordinates, place, MASTER[blueprint.precision])
            _descend(tree, path).register_parameter(leaf, nn.Parameter(parameter, requires_grad=plan.requires_grad))
            homes_of[held] = name
        for buffer in {name for unit in units for name in unit.buffers.values()}:
            path, _, leaf = buffer.rpartition(".")
            _descend(tree, path).register_buffer(leaf, None, persistent=buffer in blueprint.persistent_buffers)
        homes, shared = _homes(tree, units, names)
        scalars = tuple(
            (tree.get_submodule(held.rpartition(".")[0]), held.rpartition(".")[2])
            for name, held in names.items()
            if not blueprint.parameters[name].shape
        )
        stage_shards.append(StageShard(stage, units, homes, StageRoot(homes, shared), names, scalars))
    for stage_shard in stage_shards:
        _share(blueprint, stage_shard, mesh, factored, device)
    _fill(blueprint, weights, tree, homes_of, coordinates)
    used = {name for unit in blueprint.units for name in unit.buffers.values()}
    mine = {name for stage_shard in stage_shards for unit in stage_shard.units for name in unit.buffers.values()}
    for name, buffer in blueprint.buffers.items():
        if name in mine or name not in used:
            path, _, leaf = name.rpartition(".")
            _descend(tree, path).register_buffer(leaf, buffer.to(device), persistent=name in blueprint.persistent_buffers)
    return tree, stage_shards


def _free_name(name: str, plan: ParameterPlan, taken: set[str]) -> str:
    """What a stage calls a parameter on this rank: its name, or one of its others where an earlier stage has the module."""
    path, _, leaf = name.rpartition(".")
    for known in (name, *plan.aliases):
        if known.rpartition(".")[0] not in taken:
            return known
    return f"{path}_again.{leaf}"


def _distribute(
    plan: ParameterPlan, mesh: Mesh, coordinates: Mapping[str, int], place: DeviceMesh, dtype: torch.dtype
) -> DTensor:
    """A parameter on meta, lying on tp, or on its two factors: then a piece lies along the first and is copied along the
    second."""
    cut = Shard(plan.split["tp"]) if "tp" in plan.split else Replicate()
    if "tp" in (place.mesh_dim_names or ()):
        axes, placements = place["tp"], [cut]
    else:
        axes, placements = place[FACTORS], [cut, cut if plan.copies == 1 else Replicate()]
    shape = [part.stop - part.start for part in local_index(plan, mesh, coordinates)]
    stride = torch.empty(plan.shape, device="meta").stride()
    held = torch.empty(shape, dtype=dtype, device="meta")
    return DTensor.from_local(held, axes, placements, run_check=False, shape=torch.Size(plan.shape), stride=stride)


def local_index(plan: ParameterPlan, mesh: Mesh, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
    """Which part of a parameter the tensor-parallel rank at `coordinates` has, before it is shared out over dp."""
    index = [slice(0, size) for size in plan.shape]
    for axis, dim in plan.split.items():
        placement = plan.layout.on(axis)
        pieces, at = mesh.size(axis) // placement.copies, coordinates[axis] // placement.copies
        index[dim] = _piece(index[dim], pieces, at)
    return tuple(index)


def held_index(blueprint: Blueprint, name: str, coordinates: Mapping[str, int]) -> tuple[slice, ...]:
    """Which part of a parameter the rank at `coordinates` has between steps, where ZeRO has shared it out."""
    index = list(local_index(blueprint.parameters[name], blueprint.mesh, coordinates))
    shards = blueprint.mesh.size(SHARDING[1]) if blueprint.zero else 1
    if index:
        index[0] = _piece(index[0], shards, coordinates["dp"] % shards)
    return tuple(index)


def _piece(whole: slice, pieces: int, at: int) -> slice:
    """One piece of a range, as `torch.chunk` cuts it."""
    step = -(-(whole.stop - whole.start) // pieces)
    return slice(min(whole.stop, whole.start + at * step), min(whole.stop, whole.start + (at + 1) * step))


def _descend(tree: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made on the way where it is not there."""
    for part in path.split(".") if path else []:
        if part not in tree._modules:
            tree.add_module(part, Namespace())
        tree = tree.get_submodule(part)
    return tree


def _homes(
    tree: nn.Module, units: tuple[UnitPlan, ...], names: Mapping[str, str]
) -> tuple[list[UnitParameters], SharedParameters | None]:
    """A home for each unit of a stage, and one for the modules whose parameters several of them use."""
    readers = _readers(units, names)
    common = {path for path, indices in readers.items() if len(indices) > 1}
    apart = all(units[index].reshard for path in common for index in readers[path])
    shared = (
        SharedParameters([_alone(tree.get_submodule(path)) for path in readers if path in common], apart) if common else None
    )
    homes = []
    for unit in units:
        held = {**{short: names[name] for short, name in unit.parameters.items()}, **unit.buffers}
        places = {short: (_descend(tree, n.rpartition(".")[0]), n.rpartition(".")[2]) for short, n in held.items()}
        owned = dict.fromkeys(names[n].rpartition(".")[0] for n in unit.parameters.values())
        own = [_alone(tree.get_submodule(path)) for path in owned if path not in common]
        homes.append(UnitParameters(places, own, shared if common & owned.keys() else None, unit.path, unit.recompute))
    return homes, shared


def _alone(module: nn.Module) -> nn.Module:
    """A module that has the parameters of another as that one has them, now and later, without its children: these may belong
    to other units."""
    found = nn.Module()
    found._parameters = module._parameters
    return found


def _readers(units: tuple[UnitPlan, ...], names: Mapping[str, str]) -> dict[str, set[int]]:
    """Which units use parameters of each module, where parameters have these names."""
    found: dict[str, set[int]] = {}
    for index, unit in enumerate(units):
        for name in unit.parameters.values():
            found.setdefault(names[name].rpartition(".")[0], set()).add(index)
    return found


def _beside_copies(blueprint: Blueprint, units: tuple[UnitPlan, ...]) -> set[str]:
    """The parameters of the units that hold some in copies: one unit's parameters lie on one mesh."""
    readers = _readers(units, {name: name for unit in units for name in unit.parameters.values()})
    own = [[n for n in unit.parameters.values() if len(readers[n.rpartition(".")[0]]) == 1] for unit in units]
    return {name for names in own if any(blueprint.parameters[n].copies > 1 for n in names) for name in names}


def _share(blueprint: Blueprint, stage_shard: StageShard, mesh: DeviceMesh, factored: DeviceMesh, device: torch.device) -> None:
    """Data parallelism: parameters cut over dp as ZeRO says, or copied; cast to the compute dtype when they are gathered, and
    gradients summed over dp in the masters' dtype. The pieces get memory here."""
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE[blueprint.precision], reduce_dtype=MASTER[blueprint.precision], cast_forward_inputs=False
    )
    root, shared = stage_shard.root, stage_shard.root.shared
    modules: list[nn.Module] = [
        home for home, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True) if unit.parameters
    ]
    for module in (*modules, shared, root) if shared and shared.apart else (*modules, root):
        holder = shared if module is root and shared and not shared.apart else module
        own = [] if holder is root else [p for p in holder.parameters() if isinstance(p, DTensor)]
        in_factors = any(FACTORS[0] in (p.device_mesh.mesh_dim_names or ()) for p in own)
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
    for home, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True):
        home.copies_vectors, home.splits = unit.reshard and splits, splits
        home.compute_dtype = COMPUTE[blueprint.precision]
    _prefetch(blueprint, stage_shard)


def _prefetch(blueprint: Blueprint, stage_shard: StageShard) -> None:
    """The neighbours of a unit that is put back in pieces: gathered while it computes, in both directions.

    Where none is named, FSDP guesses from the order of past forwards, wrongly when several micro-batches are under way: a group
    names itself then.
    """
    for group in stage_shard.groups:
        group.set_modules_to_backward_prefetch([group])
    chain = [
        (home, unit)
        for home, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True)
        if unit.parameters and unit.reshard
    ]
    for (before, plan), (after, _) in itertools.pairwise(chain):
        before.set_modules_to_forward_prefetch(_groups_of(after))  # type: ignore[operator]
        if _passes_back(blueprint, plan):
            after.set_modules_to_backward_prefetch(_groups_of(before))  # type: ignore[operator]


def _groups_of(home: UnitParameters) -> list[FSDPModule]:
    """The groups that the parameters of a unit are in."""
    return [module for module in (home, home.shared) if isinstance(module, FSDPModule)]


def _passes_back(blueprint: Blueprint, unit: UnitPlan) -> bool:
    """Whether a backward goes through a unit: whether it or one before it has a parameter that is trained."""
    before = blueprint.units[: blueprint.units.index(unit) + 1]
    return any(blueprint.parameters[name].requires_grad for each in before for name in each.parameters.values())


def _fill(
    blueprint: Blueprint, weights: Weights, tree: nn.Module, names: Mapping[str, str], coordinates: Mapping[str, int]
) -> None:
    """Give this rank's pieces their numbers."""
    with torch.no_grad():
        for held, name in names.items():
            index = held_index(blueprint, name, coordinates)
            parameter = tree.get_parameter(held)
            assert isinstance(parameter, DTensor)
            into = parameter.to_local()
            if into.numel():
                into.copy_(weights(name, index))


def tied_axes(blueprint: Blueprint, mesh: DeviceMesh) -> dict[tuple[int, ...], Axis]:
    """For every set of pipeline ranks that hold the same parameter, the axis that its gradients are summed over. Called by all
    ranks together; sets that this one is not in are left out."""
    schedule, pipeline = SCHEDULES[blueprint.schedule], blueprint.mesh.pp
    sets = {
        tuple(sorted({schedule.rank_of(stage, pipeline) for stage in stages}))
        for stages in users(blueprint).values()
        if len(stages) > 1
    }
    found: dict[tuple[int, ...], Axis] = {}
    here = dist.get_rank()
    for ranks in sorted(members for members in sets if len(members) > 1):
        columns = mesh.mesh[list(ranks)].flatten(1).T  # the world ranks of each place on the other axes
        for column in columns.tolist():
            group = dist.new_group(column)
            if here in column:
                found[ranks] = Axis("pp", len(ranks), column.index(here), group)
    return found
