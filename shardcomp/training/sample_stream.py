"""Which samples belong to which step: a stream whose order no topology changes, and which resumes where a checkpoint was."""

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
    """The order of `count` samples in an epoch: `int64[count]`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


class SampleStream:
    """Samples in a random order, a new one in every epoch, without an end.

    The n-th sample of the stream is the same on every topology. In each step the data-parallel ranks take consecutive samples:
    any number of ranks reads the same batch. `position` counts the samples that all ranks together have had.

    Args:
        samples: tokens, `[n, length]` of any integer dtype.
        seed: of the order.
        rank: this rank's number among the data-parallel ranks, `sharded.mesh.get_local_rank("dp")`.
        ranks: how many data-parallel ranks there are, `sharded.mesh["dp"].size()`.
        fingerprint: of the text, so that a run does not resume with another text.

    Example:
        >>> samples = torch.arange(6).unsqueeze(1)
        >>> one_rank = SampleStream(samples, seed=0)
        >>> two_ranks = [SampleStream(samples, 0, rank, 2) for rank in range(2)]
        >>> batch, _ = one_rank.next(4)
        >>> torch.equal(batch, torch.cat([stream.next(2)[0] for stream in two_ranks]))
        True
    """

    def __init__(self, samples: Tensor, seed: int, rank: int = 0, ranks: int = 1, fingerprint: str = "") -> None:
        self.samples = samples
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.fingerprint = fingerprint
        self.position = 0

    def next(self, count: int) -> tuple[Tensor, int]:
        """This rank's samples of the next batch.

        Args:
            count: samples of each rank; the batch has `count * ranks`.

        Returns:
            The tokens, `int64[count, length]`, and their digest. The digests of all data-parallel ranks, added as 64-bit
            integers, are the digest of the batch, which is equal only for the same samples in the same order.
        """
        first = self.position + self.rank * count
        places = range(first, first + count)
        size = len(self.samples)
        chosen = [int(permutation(size, self.seed, place // size)[place % size]) for place in places]
        self.position += count * self.ranks
        tokens = self.samples[chosen].long()
        return tokens, digest(tokens, places)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. It is the same on every rank, and fits any number of ranks."""
        return {
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.samples),
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was called. Raises CheckpointError if the stream has other samples."""
        own = self.state_dict()
        differences = [
            f"{name} is {own[name]} and was {state.get(name)}"
            for name in ("samples", "fingerprint", "seed")
            if state.get(name) != own[name]
        ]
        if differences:
            raise CheckpointError(
                f"the run had other samples: {'; '.join(differences)}. Give the same text, length and seed, or begin a new run"
            )
        self.position = int(state["position"])


def digest(tokens: Tensor, places: range) -> int:
    """A signed 64-bit number that depends on every token and on each sample's place in the stream."""
    total = 0
    for place, row in zip(places, tokens, strict=True):
        sha = hashlib.sha256(place.to_bytes(8, "little") + row.contiguous().numpy().tobytes()).digest()
        total += int.from_bytes(sha[:8], "little")
    return (total + 2**63) % 2**64 - 2**63


def digest_text(total: int) -> str:
    """A digest as it is logged: 16 hexadecimal digits."""
    return f"{total % 2**64:016x}"
