"""What data-parallel ranks shard: the parameters that they gather together, over how many ranks, and the bytes that it
takes."""

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
    """The groups of a stage: the parameters of each unit, and those of modules that several units share. Parameters of no
    dimension are in none: FSDP does not take them."""
    units = [unit for unit in program.in_stages((stage,)) if unit.parameters]
    users: dict[str, int] = {}
    for unit in units:
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
    reshard, offload = (all(getattr(unit.plan, what) for unit, _ in using) for what in ("reshard", "offload"))
    backwards = sum(group.passes_back for _, group in using)
    groups.append(Group("shared by several units", tuple(shared), reshard, len(using), backwards, offload))
    return [group for group in groups if group.names]


def shards(program: Program, options: Options) -> int:
    """The number of shards that data-parallel ranks split a parameter into."""
    return program.mesh.size(SHARDING[1]) if options.zero else 1


def padded_numel(program: Program, name: str, pieces: int, rank: dict[str, int]) -> int:
    """The elements of a rank's part of a parameter, padded to rows that divide into so many shards."""
    rows, *others = local_shape(program, name, rank) or [1]
    return -(-rows // pieces) * pieces * math.prod(others)


def piece_numel(program: Program, name: str, pieces: int, rank: dict[str, int]) -> int:
    """The elements that a rank keeps of a parameter which is split into so many shards, without the padding."""
    rows, *others = local_shape(program, name, rank) or [1]
    step = -(-rows // pieces)
    return max(0, min(step, rows - rank["dp"] % pieces * step)) * math.prod(others)


def local_numel(program: Program, name: str, rank: dict[str, int]) -> int:
    """The number of elements of a parameter that the tensor-parallel rank at these coordinates has."""
    return math.prod(local_shape(program, name, rank))


def local_shape(program: Program, name: str, rank: dict[str, int]) -> list[int]:
    """The shape of what the tensor-parallel rank at these coordinates has of a parameter."""
    parameter = program.parameters[name]
    return [int(size) for size in parameter.layout.local_shape(parameter.shape, program.mesh.as_dict(), rank)]


@dataclass(frozen=True)
class Held:
    """The bytes that a rank holds between two micro-batches, on its device; `host`: what the host holds for it."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def held_in(program: Program, stage: int, options: Options, rank: dict[str, int]) -> Held:
    """What a rank holds of a stage: masters of its shards, a copy in the compute dtype where gathered parameters stay, the
    gradients, sharded from zero = 2, and the optimizer's two moments. The padding of the last shard counts, moments have
    none. An offloaded group leaves on the device what is not sharded."""
    pieces, compute, master = shards(program, options), COMPUTE[options.precision].itemsize, MASTER[options.precision].itemsize
    bytes_held = Held()
    for group in groups_of(program, stage):
        padded = {name: padded_numel(program, name, pieces, rank) for name in group.names}
        trained = [name for name in group.names if program.parameters[name].trained]
        masters = master * sum(padded.values()) // pieces
        copy = 0 if group.reshard else compute * sum(padded.values())
        whole = master * sum(local_numel(program, name, rank) for name in trained) if options.zero < 2 else 0
        reduced = master * sum(padded[name] for name in trained) // pieces if options.zero >= 2 else 0
        moments = 2 * master * sum(piece_numel(program, name, pieces, rank) for name in trained)
        if group.offload:
            bytes_held += Held(parameters=copy, gradients=whole, host=masters + reduced + moments)
        else:
            bytes_held += Held(masters + copy, whole + reduced, moments)
    return bytes_held
