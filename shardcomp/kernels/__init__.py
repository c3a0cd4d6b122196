"""Fused operators: one file each, with its plain PyTorch reference (which is its specification), its sharding rule and its
split form. A new operator is a new file, listed below."""

from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy, vocab_cross_entropy
from shardcomp.kernels.dropout import dropout, dropped_attention
from shardcomp.kernels.embedding import vocab_embedding
from shardcomp.kernels.mean import split_mean

__all__ = ["attention", "cross_entropy", "dropout", "dropped_attention", "split_mean", "vocab_cross_entropy", "vocab_embedding"]
