"""What a lowered program runs on. Emitted source imports from here and from nowhere else in shardcomp; nothing here imports the
compiler."""

from shardcomp import kernels
from shardcomp.ir.collectives import (
    allgather_reducescatter,
    allgather_split,
    allreduce_identity,
    alltoall_alltoall,
    identity_allreduce,
    narrow,
    reducescatter_allgather,
    split_allgather,
)
from shardcomp.kernels import *  # noqa: F403
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.construction import build
from shardcomp.runtime.linear import linear
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.random import Streams
from shardcomp.runtime.recompute import drop, keep, once
from shardcomp.runtime.unit import Stage, Unit, UnitParameters, local

__all__ = [
    *kernels.__all__,
    "Blueprint",
    "ShardedModel",
    "Stage",
    "Streams",
    "Unit",
    "UnitParameters",
    "allgather_reducescatter",
    "allgather_split",
    "alltoall_alltoall",
    "allreduce_identity",
    "build",
    "drop",
    "identity_allreduce",
    "keep",
    "linear",
    "local",
    "narrow",
    "once",
    "reducescatter_allgather",
    "split_allgather",
]
