"""Where the numbers of a lowered model come from: a checkpoint, the model's real tensors, or its initialization rule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from shardcomp.errors import PlanError
from shardcomp.ir.packed import group_by_packed
from shardcomp.ir.precision import MASTER
from shardcomp.ir.program import Program
from shardcomp.runtime.allocation import Weights
from shardcomp.weights.huggingface import WeightFiles
from shardcomp.weights.initialization import initialize_parameter


def read_weights(program: Program, precision: str, model: nn.Module, seed: int, checkpoint: str | Path | None) -> Weights:
    """A function that reads a slice of any parameter or persistent buffer of a program.

    A packed slice is read from its packed weight. precision: the policy's. checkpoint: a HuggingFace directory, or None to read
    the model. Raises CheckpointError where the directory does not fit, and PlanError where part of the model is on meta.
    """
    parts = {name: p.part for name, p in program.parameters.items()}
    if checkpoint is not None:
        read = _from_files(program, precision, model, checkpoint)
    else:
        read = _from_model(program, model, seed, list(group_by_packed(parts)))

    def weights(name: str, index: tuple[slice, ...]) -> Tensor:
        part = parts.get(name)
        return part.read(read, index) if part else read(name, index)

    return weights


def full_index(shape: Iterable[int]) -> tuple[slice, ...]:
    """The slice of a tensor that is all of it."""
    return tuple(slice(0, size) for size in shape)


def _from_files(program: Program, precision: str, model: nn.Module, checkpoint: str | Path) -> Weights:
    parameters, buffers = program.parameters, program.buffers
    files = WeightFiles(checkpoint)
    expected = {p.part.of if p.part else p.name: p.part.shape if p.part else tuple(p.shape) for p in parameters.values()}
    expected |= {name: tuple(buffer.value.shape) for name, buffer in buffers.items() if buffer.persistent}
    files.check(expected, program.canonical_names(), model)
    master = MASTER[precision]
    return lambda name, index: files.read(name, index, buffers[name].value.dtype if name in buffers else master)


def _from_model(program: Program, model: nn.Module, seed: int, names: list[str]) -> Weights:
    buffers = program.buffers
    real: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    meta = [name for name in names if real[name].is_meta]
    if meta and len(meta) < len(names):
        raise PlanError(
            f"{len(meta)} of {len(names)} parameters are on meta, such as {meta[0]}: give all or none, or checkpoint="
        )

    last: dict[str, Tensor] = {}  # the slices of a packed weight are read one after the other: draw it once

    def initial(name: str) -> Tensor:
        # Looked up once: another rank that is a thread of this process may have cleared it meanwhile.
        drawn = last.get(name)
        if drawn is None:
            drawn = initialize_parameter(name, model, seed, torch.float32)
            last.clear()
            last[name] = drawn
        return drawn

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        if name in buffers:
            return buffers[name].value[index]
        return initial(name)[index] if meta else real[name].detach()[index]

    return read
