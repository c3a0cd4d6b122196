"""The exceptions that shardcomp raises.

A message says where the violation is, what was asked, why not, and what would do. All violations are in one message:

    shardcomp.errors.PolicyError: options: 2 violations
      1. tensor = 0: use a whole number, 1 or more
      2. precision = "fp8": use bf16, fp32, fp16 or fp64
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ShardError(Exception):
    """Base of every error that the caller can correct.

    Example:
        >>> from shardcomp import Policy
        >>> try:
        ...     Policy.load("llama", tensor=2).mesh(world_size=7)
        ... except ShardError as error:
        ...     print(error)
        policies/llama.toml: tensor = 2 does not divide a world of 7 ranks: use tensor = 1, 7
    """

    violations: tuple[str, ...] = ()
    """The single violations, where the message lists them."""


class CaptureError(ShardError):
    """The model could not be captured as one graph."""


class PolicyError(ShardError):
    """A policy file or an option is not legal, or does not fit the model."""


class PlanError(ShardError):
    """The model and the policy are legal, but do not go together."""


class BatchError(PlanError, IndexError):
    """A batch has a number that the model cannot take, such as a token outside of the vocabulary."""


class KernelError(ShardError):
    """A kernel or a provider that the caller named cannot run."""


class CheckpointError(ShardError):
    """Files of weights are missing, damaged, or of another model."""


class VerifyError(ShardError):
    """A plan could not be compared with the dense model."""


class InternalError(ShardError):
    """A bug of shardcomp: something that a pass promises does not hold.

    Args:
        what: what does not hold.
        reproduce: the command that shows it.
    """

    def __init__(self, what: str, reproduce: str = "") -> None:
        tail = f"\nReproduce with: {reproduce}" if reproduce else ""
        super().__init__(f"{what}\nThis is a fault of shardcomp, not of the model or the policy. Please report it.{tail}")


def raise_all(kind: type[ShardError], where: str, violations: Iterable[str]) -> None:
    """Raise one `kind` with every violation, or return if there are none.

    Args:
        kind: the class of the error.
        where: what all violations are about, such as a file. The message begins with it.
        violations: one text for each. Two equal ones are shown once.
    """
    texts = list(dict.fromkeys(violations))
    if not texts:
        return
    if len(texts) == 1:
        error = kind(f"{where}: {texts[0]}")
    else:
        lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(texts, 1))
        error = kind(f"{where}: {len(texts)} violations\n{lines}")
    error.violations = tuple(texts)
    raise error


class Violations:
    """Collects the violations of several checks, to raise them as one error.

    Args:
        where: what all checks are about. The message begins with it where there is more than one violation.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.errors: list[ShardError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within, a ShardError ends the block and is kept. An InternalError is raised."""
        try:
            yield
        except InternalError:
            raise
        except ShardError as error:
            self.errors.append(error)

    def raise_if_any(self) -> None:
        """Raise what was kept: a single error as it is, several as one of their class, or a PlanError where that differs."""
        if len(self.errors) == 1:
            raise self.errors[0]
        kinds = {type(error) for error in self.errors}
        texts = (text for error in self.errors for text in error.violations or (str(error),))
        raise_all(kinds.pop() if len(kinds) == 1 else PlanError, self.where, (t.removeprefix(f"{self.where}: ") for t in texts))
