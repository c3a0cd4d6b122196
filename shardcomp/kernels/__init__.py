"""Fused operators, one file each: a plain PyTorch reference, which is the specification, the sharding rule, and the split form.

A new operator is a new file, imported below under the same name, which makes it public. Every operator runs without a compiled
library; its reference then runs.
"""

from shardcomp.kernels.adamw import adamw_ as adamw_
from shardcomp.kernels.add_rms_norm import add_rms_norm as add_rms_norm
from shardcomp.kernels.attention import attention as attention
from shardcomp.kernels.cross_entropy import cross_entropy as cross_entropy
from shardcomp.kernels.cross_entropy import vocab_cross_entropy as vocab_cross_entropy
from shardcomp.kernels.dropout import dropout as dropout
from shardcomp.kernels.dropout import dropped_attention as dropped_attention
from shardcomp.kernels.embedding import vocab_embedding as vocab_embedding
from shardcomp.kernels.gated import geglu as geglu
from shardcomp.kernels.gated import swiglu as swiglu
from shardcomp.kernels.grad_norm import grad_norm as grad_norm
from shardcomp.kernels.layer_norm import layer_norm as layer_norm
from shardcomp.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from shardcomp.kernels.linear_cross_entropy import vocab_linear_cross_entropy as vocab_linear_cross_entropy
from shardcomp.kernels.mean import split_mean as split_mean
from shardcomp.kernels.register import FUNCTIONS
from shardcomp.kernels.rms_norm import rms_norm as rms_norm
from shardcomp.kernels.rotary import rotary as rotary

__all__ = sorted(FUNCTIONS)
