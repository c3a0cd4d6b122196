"""What a lowered program runs on. Emitted source imports from here and from nowhere else in shardcomp; nothing here imports the
compiler."""

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
from shardcomp.kernels import (
    add_rms_norm,
    attention,
    cross_entropy,
    dropout,
    dropped_attention,
    geglu,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    split_mean,
    swiglu,
    vocab_cross_entropy,
    vocab_embedding,
    vocab_linear_cross_entropy,
)
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.construction import build
from shardcomp.runtime.linear import linear
from shardcomp.runtime.model import ShardedModel
from shardcomp.runtime.random import Streams
from shardcomp.runtime.recompute import drop, keep, once
from shardcomp.runtime.unit import Stage, Unit, UnitParameters, local

__all__ = [
    "Blueprint",
    "ShardedModel",
    "Stage",
    "Streams",
    "Unit",
    "UnitParameters",
    "add_rms_norm",
    "allgather_reducescatter",
    "allgather_split",
    "alltoall_alltoall",
    "allreduce_identity",
    "attention",
    "build",
    "cross_entropy",
    "drop",
    "dropout",
    "dropped_attention",
    "geglu",
    "identity_allreduce",
    "keep",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "local",
    "narrow",
    "once",
    "reducescatter_allgather",
    "rms_norm",
    "rotary",
    "split_allgather",
    "split_mean",
    "swiglu",
    "vocab_cross_entropy",
    "vocab_embedding",
    "vocab_linear_cross_entropy",
]
