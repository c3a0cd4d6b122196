"""A batch in micro-batches, and samples that do not count, which fill up a micro-batch or replace a missing one."""

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
    """A batch of `size` samples. Those from number `rows` on repeat the first one, and do not count."""
    missing = size - next(iter(batch.values())).shape[0]
    if missing:
        batch = {name: torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) for name, tensor in batch.items()}
    return uncounted(batch, rows, blueprint) if size > rows else dict(batch)


def one_sample(batch: Mapping[str, Tensor], blueprint: Blueprint) -> Batch:
    """One sample of the same inputs and length, for a rank that has none: any that the model can compute."""
    bounded = blueprint.index_bounds
    return {name: tensor.new_full((1, *tensor.shape[1:]), int(name not in bounded)) for name, tensor in batch.items()}


def uncounted(batch: Mapping[str, Tensor], start: int, blueprint: Blueprint) -> Batch:
    """The batch, in which the labels of all samples from number `start` on do not count.

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
