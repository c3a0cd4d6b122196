"""The contexts that training code calls a model in, and errors that say where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from shardcomp.errors import PlanError
from shardcomp.ir.precision import COMPUTE
from shardcomp.torch_private import NO_GRAPH_TASK, current_graph_task

_OF_A_PEER = ("Timed out", "Connection reset", "Connection closed", "Connection refused", "Broken pipe")
"""What gloo says, in a RuntimeError, of a rank that is gone or does not answer."""


def check_contexts(call: str, training: bool) -> None:
    """Raise PlanError for a context that a call cannot run in. training: whether it computes gradients."""
    if current_graph_task() != NO_GRAPH_TASK:
        raise PlanError(
            f"{call} within a backward pass, as under torch.utils.checkpoint: FSDP runs one at a time; recompute = full or "
            "selective in the policy computes activations again"
        )
    if training and not torch.is_grad_enabled():
        raise PlanError(f"{call} under no_grad or inference_mode makes no gradients: call it outside, or eval_step inside")
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled() and torch.is_grad_enabled():
        raise PlanError(
            f"{call} under detect_anomaly: torch cannot look for NaN in DTensors; use detect_anomaly(check_nan=False), and "
            "step.skipped or sharded.grad_norm() for gradients that are not finite"
        )


@contextmanager
def computable(call: str, device: torch.device, precision: str) -> Iterator[None]:
    """Within, emitted code computes as it was lowered, whatever the caller has switched on.

    Raises PlanError under an autocast to another dtype than the plan's.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # FSDP allocates in its first forward, and training needs those tensors too
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            asked, computed = torch.get_autocast_dtype(device.type), COMPUTE[precision]
            if asked != computed:
                other = "fp16" if asked == torch.float16 else "bf16"
                raise PlanError(
                    f"{call} under torch.autocast({asked}), but the plan computes in {computed}: leave autocast out, and say "
                    f"precision = {other} in the policy, which keeps float32 master weights"
                )
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def say_where(error: Exception, what: str, hint: str) -> None:
    """Put a line in front of the message of an exception from elsewhere, whose type stays. hint: what would help."""
    if isinstance(error, torch.OutOfMemoryError):
        hint = "a smaller micro_batch, recompute = full or zero = 3 take less memory"
    elif isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in _OF_A_PEER):
        hint = "another rank ended, or made no such call or backward: its own message says why; every rank makes the same ones"
    line = f"shardcomp: {what}; {hint}"
    if error.args and isinstance(error.args[0], str) and not isinstance(error, KeyError):
        error.args = (f"{line}\n{error.args[0]}", *error.args[1:])
    else:
        error.add_note(line)
