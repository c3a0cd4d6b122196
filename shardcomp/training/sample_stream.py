"""Which samples belong to which step: a stream whose order no topology changes, and which goes on where a checkpoint was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shardcomp.errors import CheckpointError


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which `count` samples are met in an epoch: `int64[count]`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


class SampleStream:
    """Samples in a random order, a new one in every epoch, without an end.

    samples: tokens, `[n, length]` of any integer dtype; rank, ranks: this one's place among the data-parallel ranks,
    `sharded.mesh["dp"]`; fingerprint: of the text, so that a run does not go on with another one.

    `position` counts the samples that all ranks together have had. The place of a sample in the stream is all that decides what
    it is: ranks take consecutive pieces, and any number of them reads the same samples in the same step.
    """

    def __init__(self, samples: Tensor, seed: int, rank: int = 0, ranks: int = 1, fingerprint: str = "") -> None:
        self.samples = samples
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.fingerprint = fingerprint
        self.position = 0

    def next(self, count: int) -> tuple[Tensor, int]:
        """This rank's `count` samples of the next batch of `count · ranks`: `int64[count, length]`, and their digest. The
        digests of all data-parallel ranks, added as 64-bit integers, are that of the batch: equal only for the same samples in
        the same order."""
        first = self.position + self.rank * count
        places = range(first, first + count)
        size = len(self.samples)
        chosen = [int(permutation(size, self.seed, place // size)[place % size]) for place in places]
        self.position += count * self.ranks
        tokens = self.samples[chosen].long()
        return tokens, digest(tokens, places)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the same on every rank, and good for any number of them."""
        return {
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.samples),
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises CheckpointError where the stream is of other samples."""
        mine = self.state_dict()
        other = [
            f"{name} is {mine[name]} and was {state.get(name)}"
            for name in ("samples", "fingerprint", "seed")
            if state.get(name) != mine[name]
        ]
        if other:
            raise CheckpointError(
                f"the run had other samples: {'; '.join(other)}. Give the same text, length and seed, or begin a new run"
            )
        self.position = int(state["position"])


def digest(tokens: Tensor, places: range) -> int:
    """A signed 64-bit number that depends on every token and on each sample's place in the stream."""
    total = 0
    for place, row in zip(places, tokens, strict=True):
        found = hashlib.sha256(place.to_bytes(8, "little") + row.contiguous().numpy().tobytes()).digest()
        total += int.from_bytes(found[:8], "little")
    return (total + 2**63) % 2**64 - 2**63


def digest_text(total: int) -> str:
    """A digest as it is logged: 16 hexadecimal digits."""
    return f"{total % 2**64:016x}"
