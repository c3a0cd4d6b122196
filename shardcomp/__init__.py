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
    from shardcomp.training.sample_stream import SampleStream
    from shardcomp.training.sample_stream import SampleStream as Stream
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
    "SampleStream": "training.sample_stream",
    "ShardError": "errors",
    "VerifyError": "errors",
    "initialize": "weights.initialization",
    "lower": "lowering",
    "shard": "materialize",
    "token_log_probs": "runtime.outputs",
    "verify": "verification.verifier",
}
_FORMER_NAMES = {"Stream": "SampleStream"}
"""Names of earlier releases, still taken."""
__all__ = [
    "AdamW",
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "KernelError",
    "PlanError",
    "Policy",
    "PolicyError",
    "SampleStream",
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
    name = _FORMER_NAMES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'shardcomp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shardcomp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, those that are not imported yet included."""
    return sorted({*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"})
