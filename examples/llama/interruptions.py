"""When a run stops or saves before its end: signals, a time limit, an interval. Clocks that jump do not matter."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

BEGAN = time.monotonic()
"""About when this process began."""


@dataclass(frozen=True)
class Interval:
    """Every so many steps, or minutes."""

    steps: int = 0
    minutes: float = 0.0

    @staticmethod
    def parse(text: str) -> Interval:
        """`200` is a number of steps, `10m` of minutes."""
        minutes = text.endswith("m")
        try:
            number = float(text[:-1]) if minutes else int(text)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is neither a number of steps, such as 200, nor of minutes, such as 10m")
        return Interval(minutes=number) if minutes else Interval(steps=int(number))


def end_with_the_launcher() -> None:
    """Have Linux send SIGTERM to this process when torchrun is killed. Otherwise it would continue to run."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Interruptions:
    """What one rank knows of them. All ranks agree after every step: they add up what `asked` returns."""

    def __init__(self, interval: Interval, time_limit: float | None, first: bool) -> None:
        self.interval = interval
        self.ends = BEGAN + 60 * time_limit if time_limit else None
        self.first = first  # whether this is the first rank, whose clock counts
        self.saved = time.monotonic()
        self.signal: str | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within, SIGTERM and SIGUSR1 end the run after the current step."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def asked(self, step: int) -> tuple[int, int, int]:
        """Whether a signal came, the time is up, and a save is due: 1 or 0 for every one."""
        now = time.monotonic()
        over = self.first and self.ends is not None and now >= self.ends
        by_steps, since = self.interval.steps, now - self.saved
        due = self.first and (step % by_steps == 0 if by_steps else since >= 60 * self.interval.minutes)
        if due:
            self.saved = now
        return int(self.signal is not None), int(over), int(due)
