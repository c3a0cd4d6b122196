"""The inputs of a call, as training code gives them: by position or by name, with arguments that have no value here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardcomp.errors import PlanError
from shardcomp.runtime.blueprint import Blueprint

NARROW_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
AS_CAPTURED = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Arguments that training code passes on, and the value that calls are captured with."""


def named_inputs(
    call: str, args: tuple[Any, ...], batch: dict[str, Any], blueprint: Blueprint, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of a call by name. Raises PlanError, with all violations, for what would fail inside the forward, or go
    wrong silently."""
    names = blueprint.positional
    if args and len(args) > len(names):
        raise PlanError(f"{call}: {len(args)} positional arguments; the model takes ({', '.join(names)}) by position")
    doubled = [name for name in names[: len(args)] if name in batch]
    if doubled:
        raise PlanError(f"{call}: {', '.join(doubled)} is given by position and by name")
    batch = dict(zip(names, args, strict=False)) | batch
    batch = {
        name: argument
        for name, argument in batch.items()
        if argument is not None and not (name in AS_CAPTURED and argument is AS_CAPTURED[name])
    }
    if not batch:
        raise PlanError(f"{call}: no inputs; give at least input_ids=")
    violations = [text for name, argument in batch.items() if (text := _misfit(name, argument, device))]
    shapes = {name: tuple(argument.shape[:2]) for name, argument in batch.items() if isinstance(argument, Tensor)}
    if not violations and len(set(shapes.values())) > 1:
        violations.append(f"inputs of one call share batch and length, but these do not: {shapes}")
    if violations:
        raise PlanError(f"{call}: {'; '.join(violations)}")
    length = next(iter(shapes.values()))[1]
    multiple = blueprint.sequence_multiple
    if length % multiple:
        longer = -(-length // multiple) * multiple
        raise PlanError(
            f"a sequence of {length} does not split over tensor = {multiple} under sequence parallelism; the next length "
            f"that does is {longer}: pad with labels of -100, or set sequence_parallel = false"
        )
    return {name: argument.long() if argument.dtype in NARROW_INTEGERS else argument for name, argument in batch.items()}


def _misfit(name: str, tensor: Any, device: torch.device) -> str:
    """Why a value cannot be an input; empty where it can."""
    if name in AS_CAPTURED and isinstance(tensor, bool):
        return f"{name} = {tensor}: calls are captured with {name} = {AS_CAPTURED[name]}; leave it out"
    if not isinstance(tensor, Tensor):
        return f"{name} is {type(tensor).__name__}: inputs must be tensors"
    if tensor.dim() < 2:
        return f"{name} has the shape {list(tensor.shape)}: inputs are [b, s]; tensor.unsqueeze(0) is one sample"
    if tensor.device.type != device.type:
        return f"{name} is on {tensor.device}, the model on {device}: {name}.to(sharded.device)"
    return ""


def shapes_of(batch: Mapping[str, Tensor]) -> str:
    """The names and shapes of a batch, for messages."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
