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
    from shardcomp.materialize import shard
    from shardcomp.policy import Policy
    from shardcomp.runtime.optimizer import AdamW
    from shardcomp.runtime.outputs import token_log_probs
    from shardcomp.training.sample_stream import Stream
    from shardcomp.verification.verifier import verify
    from shardcomp.weights.initialization import initialize

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
    "Stream": "training.sample_stream",
    "VerifyError": "errors",
    "initialize": "weights.initialization",
    "lower": "lowering",
    "shard": "materialize",
    "token_log_probs": "runtime.outputs",
    "verify": "verification.verifier",
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
