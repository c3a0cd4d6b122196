"""A batch in micro-batches, and samples that do not count: what fills up a micro-batch, or stands in for one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardcomp.errors import PlanError
from shardcomp.runtime.blueprint import Blueprint

Batch = dict[str, Tensor]


def split(batch: Mapping[str, Tensor], size: int) -> list[Batch]:
    """Micro-batches of `size` samples; the last may be smaller."""
    rows = next(iter(batch.values())).shape[0]
    return [{name: tensor[at : at + size] for name, tensor in batch.items()} for at in range(0, rows, size)]


def filled_up(batch: Mapping[str, Tensor], rows: int, size: int, blueprint: Blueprint) -> Batch:
    """A batch of `size` samples, of which those from the one number `rows` on do not count: the first is repeated."""
    missing = size - next(iter(batch.values())).shape[0]
    if missing:
        batch = {name: torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) for name, tensor in batch.items()}
    return uncounted(batch, rows, blueprint) if size > rows else dict(batch)


def one_sample(batch: Mapping[str, Tensor], blueprint: Blueprint) -> Batch:
    """A sample of the same inputs and length for a rank that has none: any that the model can compute."""
    bounded = blueprint.index_bounds
    return {name: tensor.new_full((1, *tensor.shape[1:]), int(name not in bounded)) for name, tensor in batch.items()}


def uncounted(batch: Mapping[str, Tensor], start: int, blueprint: Blueprint) -> Batch:
    """The batch with labels that do not count in all samples from the one number `start` on.

    Raises PlanError where the model has no input that holds its labels.
    """
    if not blueprint.label_inputs:
        raise PlanError(
            "the model computes its labels from several inputs, so that no sample can be added which does not count: give "
            "every rank as many samples as micro_batch divides"
        )
    labels = {name: batch[name].clone() for name in blueprint.label_inputs}
    for tensor in labels.values():
        tensor[start:] = blueprint.ignored_label
    return {**batch, **labels}
