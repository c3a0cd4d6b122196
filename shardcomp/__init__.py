"""A compiler from an unmodified HuggingFace model to the modules that one rank of a training cluster runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardcomp import checkpoint
    from shardcomp.errors import (
        BatchError,
        CaptureError,
        CheckpointError,
        KernelError,
        PlanError,
        PolicyError,
        ShardError,
        VerifyError,
    )
    from shardcomp.lowering import lower
    from shardcomp.policy import Policy
    from shardcomp.runtime.initialisation import initialize
    from shardcomp.runtime.optimizer import AdamW
    from shardcomp.runtime.outputs import token_log_probs
    from shardcomp.runtime.stream import Stream
    from shardcomp.sharding import shard
    from shardcomp.verifier import verify

__version__ = "0.1.0"

_HOMES = {
    "AdamW": "runtime.optimizer",
    "BatchError": "errors",
    "CaptureError": "errors",
    "CheckpointError": "errors",
    "KernelError": "errors",
    "PlanError": "errors",
    "Policy": "policy",
    "PolicyError": "errors",
    "ShardError": "errors",
    "Stream": "runtime.stream",
    "VerifyError": "errors",
    "initialize": "runtime.initialisation",
    "lower": "lowering",
    "shard": "sharding",
    "token_log_probs": "runtime.outputs",
    "verify": "verifier",
}
__all__ = [
    "AdamW",
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "KernelError",
    "PlanError",
    "Policy",
    "PolicyError",
    "ShardError",
    "Stream",
    "VerifyError",
    "checkpoint",
    "initialize",
    "lower",
    "shard",
    "token_log_probs",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import on first use: emitted source needs the runtime only, and `shardcomp --help` needs neither."""
    if name == "checkpoint":
        return importlib.import_module("shardcomp.checkpoint")
    if name not in _HOMES:
        raise AttributeError(f"module 'shardcomp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shardcomp.{_HOMES[name]}"), name)
