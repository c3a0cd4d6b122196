"""Which losses count as spikes, when a run is stopped, and that a resumed run goes on counting."""

from __future__ import annotations

import json
import math

import pytest

from shardcomp import ShardError
from shardcomp.training.loss_monitor import DivergedError, LossMonitor


def fed(monitor: LossMonitor, losses: list[float], start: int = 1) -> LossMonitor:
    for step, loss in enumerate(losses, start):
        monitor.observe(step, loss)
    return monitor


def test_a_loss_far_above_the_median_is_a_spike_and_does_not_move_the_median() -> None:
    monitor = fed(LossMonitor(), [2.0] * 20 + [5.9, 6.1, 2.0, 60.0])
    assert (monitor.spikes, monitor.bad, monitor.median) == (2, 0, 2.0)


def test_nothing_is_a_spike_before_there_are_sixteen_losses() -> None:
    assert fed(LossMonitor(), [1.0] * 15 + [100.0]).spikes == 0
    assert fed(LossMonitor(), [1.0] * 16 + [100.0]).spikes == 1


def test_a_falling_loss_and_small_losses_that_vary_are_no_spikes() -> None:
    assert fed(LossMonitor(), [10 * 0.97**step for step in range(300)]).spikes == 0
    assert fed(LossMonitor(), [0.01, 0.08, 0.02, 0.09] * 50).spikes == 0


def test_losses_that_are_not_finite_and_skipped_steps_are_bad() -> None:
    monitor = fed(LossMonitor(), [2.0] * 20 + [math.nan, math.inf, -math.inf])
    monitor.observe(24, 2.0, skipped=True)
    assert (monitor.spikes, monitor.bad) == (0, 4)


def test_too_many_in_a_row_stop_the_run_and_say_which() -> None:
    monitor = fed(LossMonitor(limit=3), [2.0] * 20 + [9.0, math.nan])
    with pytest.raises(DivergedError) as caught:
        monitor.observe(23, 9.5)
    assert isinstance(caught.value, ShardError) and isinstance(caught.value, FloatingPointError)
    assert str(caught.value).startswith(
        "step 23: 3 of the last 23 steps went wrong: 2 with a loss above 3 times the median (2), 1 with a loss or gradients "
        "that are not finite; the first was step 21, the loss is now 9.5."
    )


def test_too_many_in_the_window_stop_the_run_and_older_ones_do_not_count() -> None:
    every_eighth = ([2.0] * 7 + [9.0]) * 20
    fed(LossMonitor(window=32, limit=5), [2.0] * 16 + every_eighth)  # four in any 32 steps
    with pytest.raises(DivergedError, match=r"^step 48: 4 of the last 32 steps"):
        fed(LossMonitor(window=32, limit=4), [2.0] * 16 + every_eighth)


def test_a_run_that_never_trains_is_stopped_from_its_first_steps() -> None:
    with pytest.raises(DivergedError, match=r"^step 10: 10 of the last 10 steps went wrong: 10 with a loss or gradients"):
        fed(LossMonitor(), [math.nan] * 10)


def test_a_resumed_run_counts_on_as_if_it_had_not_been_killed() -> None:
    losses = [2.0] * 20 + [9.0, math.nan, 2.0, 9.0]
    whole, first = fed(LossMonitor(limit=4), losses), fed(LossMonitor(limit=4), losses[:21])
    resumed = LossMonitor(limit=4)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    fed(resumed, losses[21:], start=22)
    assert resumed.state_dict() == whole.state_dict()
    for monitor in (whole, resumed):
        with pytest.raises(DivergedError, match="step 25: 4 of the last 25"):
            monitor.observe(25, 9.0)


@pytest.mark.parametrize("wrong", [{"window": 8}, {"factor": 1.0}, {"limit": 0}, {"limit": 129}, {"margin": -1.0}])
def test_what_cannot_be_counted_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a window of 16 steps or more"):
        LossMonitor(**wrong)  # type: ignore[arg-type]
