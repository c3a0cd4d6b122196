"""The exceptions that shardcomp raises. A message says where, what was asked, why it cannot be, and what would do."""

from __future__ import annotations

from collections.abc import Iterable


class ShardError(Exception):
    """Base of every error that is the caller's to mend."""


class CaptureError(ShardError):
    """The model could not be captured as one graph."""


class PolicyError(ShardError):
    """A policy file or option is wrong, or does not fit the model."""


class PlanError(ShardError):
    """The model and the policy are each fine, but what was asked of them together cannot be done."""


class BatchError(PlanError, IndexError):
    """A batch has a number that the model cannot take, such as a token outside of the vocabulary."""


class KernelError(ShardError):
    """A named kernel or provider cannot run."""


class CheckpointError(ShardError):
    """Files of weights are missing, damaged or of another model."""


class VerifyError(ShardError):
    """A plan could not be compared with the dense model."""


class InternalError(ShardError):
    """A fault of shardcomp itself: something that a pass promised does not hold."""

    def __init__(self, what: str, reproduce: str = "") -> None:
        tail = f"\nReproduce with: {reproduce}" if reproduce else ""
        super().__init__(f"{what}\nThis is a fault of shardcomp, not of the model or the policy. Please report it.{tail}")


def raise_all(kind: type[ShardError], where: str, violations: Iterable[str]) -> None:
    """Raise one `kind` that lists every violation, or return if there are none."""
    found = list(dict.fromkeys(violations))
    if not found:
        return
    if len(found) == 1:
        raise kind(f"{where}: {found[0]}")
    lines = "\n".join(f"  {i}. {text}" for i, text in enumerate(found, 1))
    raise kind(f"{where}: {len(found)} problems\n{lines}")
