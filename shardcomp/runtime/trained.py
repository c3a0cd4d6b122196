"""Which parameters have requires_grad, which training code may change at any time, as in gradual unfreezing."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from shardcomp.ir.collectives import Axis
from shardcomp.runtime.blueprint import Blueprint


class TrainedParameters:
    """The parameters of a rank that have requires_grad, beside those that its code was lowered to train.

    named: this rank's parameters, as `fsdp.named_parameters` gives them. names: what the code trains, of all ranks together.
    """

    def __init__(self, named: Sequence[tuple[str, Any]], blueprint: Blueprint) -> None:
        self._named, self._all = named, sorted(blueprint.parameters)
        self.names = frozenset(name for name, plan in blueprint.parameters.items() if plan.requires_grad)
        self._flags: tuple[bool, ...] = ()
        self._digest = 0
        self._grew = False

    def look(self) -> tuple[int, bool]:
        """A digest of what has requires_grad on this rank, and whether the code does not train some of it yet.

        Frozen parameters need no new code: its sums over ranks find no gradient and do nothing.
        """
        flags = tuple(entry.sharded_param.requires_grad for _, entry in self._named)
        if flags != self._flags:
            self._flags, self._digest = flags, zlib.crc32(bytes(flags))
            self._grew = not self._now() <= self.names
        return self._digest, self._grew

    def grow(self, axes: Iterable[Axis], device: torch.device) -> frozenset[str]:
        """What the code must train from now on: what it does already, and what has requires_grad on a rank along `axes`."""
        names = self.names | self._now()
        flags = torch.tensor([[name in names for name in self._all]], dtype=torch.int64, device=device)
        for axis in axes:
            flags = axis.all_gather(flags, 0).amax(0, keepdim=True)
        self.names = frozenset(name for name, flag in zip(self._all, flags[0].tolist(), strict=True) if flag)
        self._grew = False
        return self.names

    def _now(self) -> frozenset[str]:
        return frozenset(name for name, entry in self._named if entry.sharded_param.requires_grad)
