"""What a rank stores between two micro-batches: this module counts the bytes of its masters, gradients and optimizer moments.

It also lists the groups of parameters that data-parallel ranks gather together, and counts the shards of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardcomp.ir.mesh import SHARDING
from shardcomp.ir.precision import COMPUTE, MASTER
from shardcomp.ir.program import Program
from shardcomp.policy.options import Options


@dataclass(frozen=True)
class Group:
    """Parameters that data-parallel ranks gather together and whose gradients they sum together.

    reshard: whether they are resharded after a forward, and gathered again for its backward and for the next unit that uses
    them. users: how many units those are; passes_back: through how many of them a backward goes.
    """

    where: str
    names: tuple[str, ...]
    reshard: bool
    users: int
    passes_back: int
    offload: bool


def groups_of(program: Program, stage: int) -> list[Group]:
    """The groups of a stage: the parameters of each unit, and the parameters of modules that several units share. 0-d
    parameters are in no group: FSDP does not take them."""
    units = [unit for unit in program.in_stages((stage,)) if unit.parameters]
    users: dict[str, int] = {}
    for unit in units:
        # By module, because FSDP gathers modules: a module with one shared parameter is shared.
        for module in {name.rpartition(".")[0] for name in unit.parameters}:
            users[module] = users.get(module, 0) + 1
    groups: list[Group] = []
    shared: dict[str, None] = {}
    for unit in units:
        sized = [name for name in unit.parameters if program.parameters[name].shape]
        own = tuple(name for name in sized if users[name.rpartition(".")[0]] == 1)
        shared.update(dict.fromkeys(name for name in sized if name not in own))
        passes_back = int(any(program.values[name].requires_grad for name in unit.outputs))
        groups.append(Group(unit.path, own, unit.plan.reshard, 1, passes_back, unit.plan.offload))
    using = [(unit, group) for unit, group in zip(units, groups, strict=True) if shared.keys() & unit.parameters]
    # The shared group is sharded or offloaded only where every unit that uses it agrees.
    reshard, offload = (all(getattr(unit.plan, what) for unit, _ in using) for what in ("reshard", "offload"))
    backwards = sum(group.passes_back for _, group in using)
    groups.append(Group("shared by several units", tuple(shared), reshard, len(using), backwards, offload))
    return [group for group in groups if group.names]


def shards(program: Program, options: Options) -> int:
    """The number of shards that data-parallel ranks split a parameter into."""
    return program.mesh.size(SHARDING[1]) if options.zero else 1


def padded_numel(program: Program, name: str, shard_count: int, rank: dict[str, int]) -> int:
    """The elements of a tensor-parallel rank's share of a parameter, padded to rows that divide into so many shards."""
    # A 0-d parameter counts as one row.
    rows, *others = local_shape(program, name, rank) or [1]
    return -(-rows // shard_count) * shard_count * math.prod(others)


def shard_numel(program: Program, name: str, shard_count: int, rank: dict[str, int]) -> int:
    """The elements that a rank keeps of a parameter which is split into so many shards, without the padding."""
    rows, *others = local_shape(program, name, rank) or [1]
    step = -(-rows // shard_count)
    # dp is (groups, shards), shards innermost: the remainder tells which shard this rank has.
    return max(0, min(step, rows - rank["dp"] % shard_count * step)) * math.prod(others)


def local_numel(program: Program, name: str, rank: dict[str, int]) -> int:
    """The number of elements of a parameter that the tensor-parallel rank at these coordinates has."""
    return math.prod(local_shape(program, name, rank))


def local_shape(program: Program, name: str, rank: dict[str, int]) -> list[int]:
    """The shape of what the tensor-parallel rank at these coordinates has of a parameter."""
    parameter = program.parameters[name]
    return [int(size) for size in parameter.layout.local_shape(parameter.shape, program.mesh.as_dict(), rank)]


@dataclass(frozen=True)
class StoredBytes:
    """The bytes that a rank stores between two micro-batches, on its device; `host`: what the host stores for it."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0

    def __add__(self, other: StoredBytes) -> StoredBytes:
        return StoredBytes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def stored_bytes(program: Program, stage: int, options: Options, rank: dict[str, int]) -> StoredBytes:
    """What a rank stores of a stage: masters of its shards, a copy in the compute dtype where gathered parameters stay, the
    gradients, sharded from zero = 2, and the optimizer's two moments. The padding of the last shard counts, moments have
    none. An offloaded group leaves on the device what is not sharded."""
    shard_count = shards(program, options)
    compute, master = COMPUTE[options.precision].itemsize, MASTER[options.precision].itemsize
    total = StoredBytes()
    for group in groups_of(program, stage):
        padded = {name: padded_numel(program, name, shard_count, rank) for name in group.names}
        trained = [name for name in group.names if program.parameters[name].trained]
        masters = master * sum(padded.values()) // shard_count
        copy = 0 if group.reshard else compute * sum(padded.values())
        unsharded_gradients = master * sum(local_numel(program, name, rank) for name in trained) if options.zero < 2 else 0
        reduced = master * sum(padded[name] for name in trained) // shard_count if options.zero >= 2 else 0
        # The optimizer works on plain shards, which have no padding.
        moments = 2 * master * sum(shard_numel(program, name, shard_count, rank) for name in trained)
        if group.offload:
            total += StoredBytes(parameters=copy, gradients=unsharded_gradients, host=masters + reduced + moments)
        else:
            total += StoredBytes(masters + copy, unsharded_gradients + reduced, moments)
    return total
