"""The stream of samples: no topology changes it, it goes on where it was, and its digest tells one batch from any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardcomp import CheckpointError, SampleStream
from shardcomp.training.sample_stream import digest, digest_text

SAMPLES = torch.arange(100, dtype=torch.uint8).view(50, 2)


def taken(stream: SampleStream, count: int) -> torch.Tensor:
    return stream.next(count)[0]


@given(
    count=st.integers(1, 30), steps=st.integers(0, 8), batch=st.integers(1, 3), ranks=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(
    count: int, steps: int, batch: int, ranks: int, seed: int
) -> None:
    samples = torch.arange(count, dtype=torch.uint8).view(count, 1)
    one, many = SampleStream(samples, seed), [SampleStream(samples, seed, rank, ranks) for rank in range(ranks)]
    for _ in range(steps + 1):
        tokens, total = one.next(batch * ranks)
        apart = [each.next(batch) for each in many]
        assert torch.equal(torch.cat([held for held, _ in apart]), tokens)
        assert digest_text(sum(mine for _, mine in apart)) == digest_text(total)


@given(before=st.integers(0, 40), split=st.sampled_from([1, 2, 3, 4, 6]), seed=st.integers(0, 9))
def test_it_goes_on_under_another_number_of_ranks(before: int, split: int, seed: int) -> None:
    whole, first = SampleStream(SAMPLES, seed), SampleStream(SAMPLES, seed)
    taken(whole, before)
    taken(first, before)
    ranks = [SampleStream(SAMPLES, seed, rank, split) for rank in range(split)]
    for each in ranks:
        each.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([taken(each, 12 // split) for each in ranks]), taken(whole, 12))


def test_an_epoch_meets_every_sample_once_and_the_next_in_another_order() -> None:
    stream = SampleStream(torch.arange(50, dtype=torch.uint8).view(50, 1), 3)
    first, second = taken(stream, 50).flatten(), taken(stream, 50).flatten()
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(50))
    assert not torch.equal(taken(SampleStream(SAMPLES, 0), 50), taken(SampleStream(SAMPLES, 1), 50))


def test_a_digest_tells_tokens_and_places_apart() -> None:
    tokens = torch.arange(12).view(3, 4)
    known = digest(tokens, range(3))
    assert known == digest(tokens.clone(), range(3)) and -(2**63) <= known < 2**63
    assert known != digest(tokens, range(1, 4)) and known != digest(tokens.flip(0), range(3))
    changed = tokens.clone()
    changed[2, 3] += 1
    assert known != digest(changed, range(3))
    assert len(digest_text(-1)) == len(digest_text(known)) == 16


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (SampleStream(SAMPLES, 1), "seed is 1 and was 0"),
        (SampleStream(SAMPLES[:7], 0), "samples is 7 and was 50"),
        (SampleStream(SAMPLES, 0, fingerprint="b"), "fingerprint is b and was "),
    ],
)
def test_other_samples_are_refused(other: SampleStream, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        other.load_state_dict(SampleStream(SAMPLES, 0).state_dict())
