"""Whether all ranks start from the same plan and the same weights.

Ranks that build a model with a fresh head or adapters and no seed have different numbers. Replicated weights would stay
different for good.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.runtime.digest import digest

_INSTEAD = (
    "Build the model with one seed on all ranks, or take rank 0's numbers: shard(..., sync_weights=True); "
    "compare_ranks = false in the policy compares nothing"
)


def check_alike(facts: Mapping[str, str], ranks: Axis, device: torch.device) -> None:
    """Raise PlanError on every rank where the ranks differ in a fact about the run, such as the policy.

    facts: what may differ, in words -> a text. All ranks have the same words.
    """
    if ranks.size == 1 or not facts:
        return
    own = torch.tensor([[zlib.crc32(text.encode()) for text in facts.values()]], dtype=torch.int64).to(device)
    every = ranks.all_gather(own, 0).cpu()
    differ = (every != every[:1]).any(0).tolist()
    names = [name for name, different in zip(facts, differ, strict=True) if different]
    if names:
        where = (every != every[:1]).any(1).nonzero().flatten().tolist()
        raise PlanError(
            f"ranks 0 and {', '.join(map(str, where))} have another {' and another '.join(names)}: every rank is to build the "
            "same model and load the same policy, with the same versions"
        )


def check_same(tensors: Iterable[tuple[str, Tensor]], ranks: Axis, device: torch.device) -> None:
    """Raise PlanError on every rank where the named tensors differ between ranks, which all have them, in one order."""
    hashes = [] if ranks.size == 1 else [(name, int(digest(tensor))) for name, tensor in tensors]
    if not hashes:
        return
    own = torch.tensor([[number for _, number in hashes]], dtype=torch.int64).to(device)
    every = ranks.all_gather(own, 0).cpu()
    differ = (every != every[:1]).any(0).tolist()
    names = [name for (name, _), different in zip(hashes, differ, strict=True) if different]
    if names:
        where = (every != every[:1]).any(1).nonzero().flatten().tolist()
        _refuse(names, f"ranks 0 and {', '.join(map(str, where))}")


def check_replicated(
    shards: Mapping[str, tuple[tuple[slice, ...], Tensor]], names: Iterable[str], ranks: Axis, device: torch.device
) -> None:
    """Raise PlanError on every rank where two ranks have different numbers for the same shard of a parameter.

    shards: a parameter's name -> (slice, numbers) of this rank. names: all parameters of the model, the same on every rank.
    """
    names = [] if ranks.size == 1 else list(names)
    rows = []
    for name in names:
        index, tensor = shards.get(name, ((), None))
        place = 0 if tensor is None else 1 + zlib.crc32(repr(index).encode())
        rows.append([place, 0 if tensor is None else int(digest(tensor))])
    if not rows:
        return
    every = ranks.all_gather(torch.tensor([rows], dtype=torch.int64).to(device), 0).cpu().tolist()
    differ = []
    for column, name in enumerate(names):
        known: dict[int, int] = {}
        copies = [tuple(rank[column]) for rank in every if rank[column][0]]
        if any(known.setdefault(place, number) != number for place, number in copies):
            differ.append(name)
    if differ:
        _refuse(differ, "ranks that hold the same part of them")


def broadcast_from_first(tensor: Tensor, ranks: Axis, device: torch.device) -> Tensor:
    """Rank 0's tensor, on every rank. The others pass one of the same shape and dtype."""
    received = tensor.detach().to(device, copy=True).contiguous()
    if ranks.size > 1:
        dist.broadcast(received, src=0)
    return received


def _refuse(names: list[str], ranks: str) -> None:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise PlanError(
        f"{ranks} have other numbers for {shown}: each built its own, as with a fresh head or adapters and no seed. {_INSTEAD}"
    )
