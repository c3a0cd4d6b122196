"""The pipeline schedules by their names: how many stages a rank runs, which, and whether they split the backward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What sets a schedule apart.

    stages_per_rank: how many stages a rank runs (virtual stages) where nobody says. interleaves: whether that number is the
    user's choice. v_shaped: the stages go down the ranks and up again, so that rank 0 has the first and the last; else they go
    round. splits_backward: gradients of inputs and of weights are computed at different times.
    """

    name: str
    stages_per_rank: int = 1
    interleaves: bool = False
    v_shaped: bool = False
    splits_backward: bool = False

    def rank_of(self, stage: int, pipeline: int) -> int:
        """The pipeline rank that runs `stage`, counted over all ranks from the input to the loss."""
        # In a V, every second turn comes back up the ranks: 0 1 2 3 | 3 2 1 0.
        turn, place = divmod(stage, pipeline)
        return pipeline - 1 - place if self.v_shaped and turn % 2 else place

    def stages_of(self, rank: int, pipeline: int, stages: int) -> list[int]:
        """The stages of a pipeline rank, in the order of the model."""
        return [stage for stage in range(stages) if self.rank_of(stage, pipeline) == rank]


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("1f1b"),
        Schedule("gpipe"),
        Schedule("interleaved", stages_per_rank=2, interleaves=True),
        Schedule("zero_bubble", interleaves=True, splits_backward=True),
        Schedule("zbv", stages_per_rank=2, v_shaped=True, splits_backward=True),
        Schedule("dualpipev", stages_per_rank=2, v_shaped=True, splits_backward=True),
    )
}
"""Name -> schedule, the default first."""
