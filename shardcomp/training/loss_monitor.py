"""Whether a run still trains: counts steps whose loss jumps or is not finite, and stops when there are too many."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from shardcomp.errors import ShardError

LEAST = 16
"""The median is taken over this many losses, at least."""


class DivergedError(ShardError, FloatingPointError):
    """Too many steps of a run were bad: it no longer trains."""


class LossMonitor:
    """Counts the bad steps of a run.

    A step is bad if its loss is not finite, or if it was skipped. It is a spike if its loss is far above the median of the good
    steps in the window. `bad` and `spikes` count the two over the whole run. All ranks see the same losses, and stop together.

    Args:
        window: how many of the last steps are looked at.
        factor: a spike's loss is above the median by this factor.
        limit: a window with this many bad steps and spikes ends the run.
        margin: a spike's loss is also this much above the median, so that small losses may vary.

    Example:
        >>> monitor = LossMonitor(window=16, limit=2)
        >>> for step in range(16):
        ...     monitor.observe(step, 2.0)
        >>> monitor.observe(16, 9.0)
        >>> monitor.spikes
        1
        >>> monitor.observe(17, float("nan"))
        Traceback (most recent call last):
        ...
        shardcomp.training.loss_monitor.DivergedError: step 17: 2 of the last 16 steps went wrong: ...
    """

    def __init__(self, window: int = 128, factor: float = 3.0, limit: int = 10, margin: float = 0.5) -> None:
        if not (window >= LEAST and factor > 1 and 1 <= limit <= window and margin >= 0):
            values = f"window = {window}, factor = {factor}, limit = {limit}, margin = {margin}"
            legal = f"a window of {LEAST} steps or more, a factor above 1, a limit of 1 to the window, a margin of 0 or more"
            raise ValueError(f"{values}: give {legal}")
        self.window, self.factor, self.limit, self.margin = window, factor, limit, margin
        self.spikes = self.bad = 0
        self._steps: deque[tuple[int, str, float | None]] = deque(maxlen=window)

    @property
    def median(self) -> float | None:
        """The median of the good losses in the window; None while there are too few."""
        good = [loss for _, kind, loss in self._steps if kind == "good" and loss is not None]
        return statistics.median(good) if len(good) >= LEAST else None

    def observe(self, step: int, loss: float, skipped: bool = False) -> None:
        """Take the loss of a step.

        Args:
            step: its number, for messages.
            loss: the mean over all labels that count, the same on every rank.
            skipped: its gradients were not finite, and a lower loss scale would not have helped.

        Raises:
            DivergedError: this step is the `limit`-th in the window that is bad or a spike.
        """
        median = self.median
        if skipped or not math.isfinite(loss):
            kind = "bad"
            self.bad += 1
        elif median is not None and loss > max(self.factor * median, median + self.margin):
            kind = "spike"
            self.spikes += 1
        else:
            kind = "good"
        self._steps.append((step, kind, loss if math.isfinite(loss) else None))
        wrong = [(at, what) for at, what, _ in self._steps if what != "good"]
        if kind != "good" and len(wrong) >= self.limit:
            raise DivergedError(self._verdict(step, loss, median, wrong))

    def _verdict(self, step: int, loss: float, median: float | None, wrong: list[tuple[int, str]]) -> str:
        spikes = sum(kind == "spike" for _, kind in wrong)
        kinds = []
        if spikes:
            shown = "" if median is None else f" ({median:.4g})"
            kinds.append(f"{spikes} with a loss above {self.factor:g} times the median{shown}")
        if len(wrong) > spikes:
            kinds.append(f"{len(wrong) - spikes} with a loss or gradients that are not finite")
        return (
            f"step {step}: {len(wrong)} of the last {len(self._steps)} steps went wrong: {', '.join(kinds)}; the first was "
            f"step {wrong[0][0]}, the loss is now {loss:.4g}. Resume from a checkpoint before that step with a lower learning "
            f"rate, a longer warm-up or other samples"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in values that JSON has."""
        return {"spikes": self.spikes, "bad": self.bad, "steps": [list(entry) for entry in self._steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned. A smaller window takes the latest steps."""
        self.spikes, self.bad = int(state["spikes"]), int(state["bad"])
        self._steps = deque(((step, kind, loss) for step, kind, loss in state["steps"]), maxlen=self.window)
