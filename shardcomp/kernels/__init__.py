"""Fused operators, one file each: a plain PyTorch reference, which is the specification, the sharding rule, and the split form.

A new operator is a new file, imported below. Every operator runs without a compiled library; its reference then runs.
"""

from shardcomp.kernels.adamw import adamw_
from shardcomp.kernels.add_rms_norm import add_rms_norm
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy, vocab_cross_entropy
from shardcomp.kernels.dropout import dropout, dropped_attention
from shardcomp.kernels.embedding import vocab_embedding
from shardcomp.kernels.gated import geglu, swiglu
from shardcomp.kernels.grad_norm import grad_norm
from shardcomp.kernels.layer_norm import layer_norm
from shardcomp.kernels.linear_cross_entropy import linear_cross_entropy, vocab_linear_cross_entropy
from shardcomp.kernels.mean import split_mean
from shardcomp.kernels.rms_norm import rms_norm
from shardcomp.kernels.rotary import rotary

__all__ = [
    "adamw_",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "dropout",
    "dropped_attention",
    "geglu",
    "grad_norm",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "split_mean",
    "swiglu",
    "vocab_cross_entropy",
    "vocab_embedding",
    "vocab_linear_cross_entropy",
]
