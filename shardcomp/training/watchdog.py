"""Ends a job in which a rank died or hangs. The message names the rank, and the collective that the others wait in.

Every rank has a watchdog in a thread of its own, which hears of progress once a step. A watchdog that hears nothing for the
time-out asks the watchdogs of all ranks where they are, through the store of the process group. They read it from their Python
stacks. Until then a rank sends three small requests a second to the store, and records nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypedDict

import torch.distributed as dist

from shardcomp.training import stack_location
from shardcomp.training.stack_location import Place
from shardcomp.training.store_client import StoreClient, StoreLostError
from shardcomp.training.verdict import Answer, MissingRank, describe, first_line, verdict

_count = 0
"""How many watchdogs this process has had. Those of all ranks with the same number belong together."""
_handlers: list[Watchdog] = []
"""The watchdogs that handle SIGTERM."""


class _Finding(TypedDict):
    """What the rank that asked writes for the others. `off`: nobody holds up the job. `ranks`: those that answered."""

    off: bool
    text: str
    ranks: list[int]


class Watchdog:
    """Watches the progress of this rank, and finds out together with the other ranks who holds up the job.

    Every rank makes one when the process group runs. It is a context manager: its end stops it.

    torchrun sends SIGTERM to all ranks as soon as one of them dies. If the program does not handle SIGTERM, the watchdog does.
    The process ends as it would without a watchdog, but first tells who died.

    Args:
        timeout: seconds without a `beat` after which the ranks are asked. Keep it below the time-out of the process group:
            that one tells less.
        act: called with the message when a rank died or hangs, in the watchdog's thread. One rank has the whole message, the
            others have a line. By default it prints the message and ends the process with status 1: the launcher ends the job.
        poll: seconds between two looks at the store; by default 1, and 4 for a thousand ranks.
        grace: seconds in which a rank has to answer.
        ignore: background threads whose name starts with one of these are not looked at.

    Example:
        >>> with Watchdog(timeout=300) as watchdog:  # doctest: +SKIP
        ...     for step in range(steps):
        ...         sharded.train_step(**batch)
        ...         watchdog.beat(f"step {step}")
    """

    def __init__(
        self,
        timeout: float = 300.0,
        *,
        act: Callable[[str], None] | None = None,
        poll: float | None = None,
        grace: float | None = None,
        ignore: tuple[str, ...] = ("shardcomp-",),
    ) -> None:
        global _count
        _count += 1
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._poll = poll or max(1.0, self.size / 256)
        self._grace = grace or 2 * self._poll + 1.0
        self._act = act or end
        self._ignore = ignore
        self._last_beat: tuple[str, float, int] = ("", time.monotonic(), threading.get_ident())  # text, time, thread
        self._failed: tuple[Place, str] | None = None  # where a collective failed on this rank, and how
        self._message = ""  # the verdict, for this rank to print
        self._terminated = False  # SIGTERM has come
        self._stopped = False
        self._over = threading.Event()  # there is a verdict
        self._store = StoreClient(f"shardcomp-watchdog/{_count}", self._grace)
        self._question = 0  # the number of the question: how many before it were called off
        self._next_alive = (-1, time.monotonic())  # of the next rank: how many signs of life, and when that last grew
        self._stored_beat = ""  # the beat that the store has
        self._awake, self._wakes = os.pipe()
        for end_of_pipe in (self._awake, self._wakes):
            os.set_blocking(end_of_pipe, False)
        self._store.set(f"host/{self.rank}", socket.gethostname())
        self._handle_sigterm()
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._watch, name="shardcomp-watchdog", daemon=True)
        self._thread.start()

    # -- for the program -------------------------------------------------------------------------------------------------

    def beat(self, what: str) -> None:
        """Report progress. `what` names it in messages, such as "step 17". Costs less than a microsecond."""
        self._last_beat = (what, time.monotonic(), threading.get_ident())

    def explain(self, error: BaseException) -> str | None:
        """Who is gone or holds up the job, and where the others wait. None if it is not a collective that raised `error`.

        gloo and NCCL raise one where another rank is gone. This takes a few seconds, and this rank should end afterwards.
        """
        if self._stopped or not stack_location.is_communication(error):
            return None
        if not self._message:
            self._failed = (stack_location.of_error(error), first_line(error))
            self._wake()
        if not self._over.wait(4 * self._grace + 2.0):
            self._message = self._message or f"shardcomp: the other ranks could not be asked\n  {self._position()}"
        return self._message

    def stop(self, why: str = "") -> None:
        """Stop watching, as at the end of training. why: told to the other ranks if they miss this one."""
        if self._stopped:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        self._give_back_sigterm()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._grace)
        if not self._thread.is_alive():
            os.close(self._awake)
            os.close(self._wakes)
            self._awake = self._wakes = -1
        if not self._over.is_set():  # else nobody asks any more, and the store may be gone
            with contextlib.suppress(StoreLostError):
                self._store.set(f"left/{self.rank}", why or f"it ended after {self._last_beat[0] or 'no step'}", 1.0)
                self._store.add("left", 1, 1.0)
        self._store.close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching, and print `explain` of an exception that leaves the block."""
        printed = self._message
        if error is not None and (message := self.explain(error)) and message != printed:
            _print(message)
        self.stop("" if error is None else f"{type(error).__name__}: {first_line(error)}")

    # -- SIGTERM ---------------------------------------------------------------------------------------------------------

    def _handle_sigterm(self) -> None:
        """Handle SIGTERM if nobody does.

        A Python handler does not run while the main thread waits in a collective. But Python writes the signal's number to the
        wake-up pipe at once, which the watchdog's thread reads.
        """
        self._takes_sigterm = threading.current_thread() is threading.main_thread()
        self._takes_sigterm &= signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._takes_sigterm:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            _handlers.append(self)
            if (other := signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)) != -1:
                signal.set_wakeup_fd(other)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():  # the thread has ended
            _leave(128 + signal.SIGTERM)
        self._terminated = True
        self._wake()

    def _give_back_sigterm(self) -> None:
        if self in _handlers:
            _handlers.remove(self)
            if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                _default_sigterm(self._wakes)

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the pipe is full, so the thread wakes in any case
            os.write(self._wakes, b"\0")

    def _sleep(self, seconds: float) -> None:
        if select.select([self._awake], [], [], seconds)[0]:
            try:
                signals = os.read(self._awake, 4096)
            except BlockingIOError:
                return
            if signal.SIGTERM in signals and self in _handlers and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                self._terminated = True

    def _watch(self) -> None:
        beat, idle, now = self._last_beat, 0.0, time.monotonic()
        draw = random.Random()  # not the program's own generator, whose state is part of checkpoints
        while not self._stopped and not self._over.is_set():
            self._sleep(self._poll * draw.uniform(0.8, 1.2))
            # A time in which this process did not run does not count: a whole job may be suspended.
            before, now = now, time.monotonic()
            idle = idle + min(now - before, 5 * self._poll) if beat is self._last_beat else 0.0
            beat = self._last_beat
            if self._stopped:
                return
            try:
                self._round("time" if idle > self.timeout else "")
            except StoreLostError:
                if self._failed or (idle > self.timeout and not self._terminated):
                    self._conclude(self._without_store())
                elif self._terminated:
                    _leave(128 + signal.SIGTERM)
            except Exception as error:  # a bug of the watchdog must not end a job
                print(f"shardcomp: the watchdog of rank {self.rank} stopped: {error!r}", file=sys.stderr, flush=True)
                self._over.set()

    def _round(self, why: str) -> None:
        """Look at the store: show a sign of life, and answer a question or ask one. why: the reason to ask, if there is one."""
        key = f"asked/{self._question}"
        asked = self._store.add(key, 0)
        self._store.add(f"alive/{self.rank}", 1)
        if self.size > 1:
            signs = self._store.add(f"alive/{(self.rank + 1) % self.size}", 0)
            if signs != self._next_alive[0]:
                self._next_alive = (signs, time.monotonic())
        if self._last_beat[0] != self._stored_beat:
            self._stored_beat = self._last_beat[0]
            self._store.set(f"beat/{self.rank}", self._stored_beat)
        if self._failed:
            why = "a collective failed"
        elif self._terminated:
            why = "SIGTERM"
        if asked:
            self._answer()
            self._await_finding()
        elif why and self._store.add(key, 1) == 1:  # several ranks may ask at once: the first one does
            self._answer()
            self._judge(why)

    def _own_answer(self) -> Answer:
        beat, when, thread = self._last_beat
        place, failure = self._failed or (stack_location.here(thread, self._ignore), "")
        return Answer(place, beat, time.monotonic() - when, failure, time.monotonic() - self._next_alive[1])

    def _answer(self) -> None:
        self._store.set(f"answer/{self._question}/{self.rank}", json.dumps(asdict(self._own_answer())))
        self._store.add(f"answers/{self._question}", 1)

    def _judge(self, why: str) -> None:
        """Called on the rank that asked: wait for the answers, and find out who holds up the job, or that nobody does."""
        began, beat, question = time.monotonic(), self._last_beat, self._question
        answers: dict[int, Answer] = {}
        missing: dict[int, MissingRank] = {}
        while True:
            late = time.monotonic() - began > self._grace
            heard = self._store.add(f"answers/{question}", 0) + self._store.add("left", 0)
            if late or heard >= self.size:
                texts = {rank: self._store.get(f"answer/{question}/{rank}") for rank in range(self.size)}
                answers = {rank: Answer.read(text) for rank, text in texts.items() if text is not None}
                passed = time.monotonic() - began
                missing = {rank: self._missing(rank, answers, passed) for rank, text in texts.items() if text is None}
                if late or all(known.left for known in missing.values()):
                    break
            time.sleep(min(0.05, self._poll))
        broken = any(known.left is None for known in missing.values()) or any(a.failure for a in answers.values())
        off = (why == "SIGTERM" and not broken) or (why == "time" and beat is not self._last_beat)
        reason = {"time": f"no progress for {self.timeout:g} s", "SIGTERM": "the job is being ended"}.get(why, why)
        finding: _Finding = {"off": off, "text": verdict(reason, answers, missing), "ranks": sorted(answers)}
        self._store.set(f"verdict/{question}", json.dumps(finding))
        self._act_on(finding)

    def _missing(self, rank: int, answers: Mapping[int, Answer], passed: float) -> MissingRank:
        """What is known of a rank that does not answer. passed: seconds since the answers were written, about."""
        previous = answers.get((rank - 1) % self.size)
        host, beat, left = (self._store.get(f"{key}/{rank}") for key in ("host", "beat", "left"))
        return MissingRank(host, beat, previous.next_silent + passed if previous else None, left)

    def _await_finding(self) -> None:
        """Called on the ranks that were asked: wait for what the one that asked finds."""
        began = time.monotonic()
        while time.monotonic() - began < 3 * self._grace + 1.0:
            if (text := self._store.get(f"verdict/{self._question}")) is not None:
                return self._act_on(json.loads(text))
            time.sleep(min(0.05, self._poll))
        self._conclude(f"shardcomp: the rank that asked where the others are is gone itself\n  {self._position()}")

    def _act_on(self, finding: _Finding) -> None:
        """Print a verdict and end the job, or call off the question."""
        question, speaker = self._question, (finding["ranks"] or [self.rank])[0]
        if finding["off"]:
            self._question += 1
            self._confirm_read(question, len(finding["ranks"]))
            if self._terminated:
                _leave(128 + signal.SIGTERM)
            return
        speaks = self.rank == speaker
        short = finding["text"].splitlines()[0]
        message = finding["text"] if speaks else f"{short} (rank {self.rank} ends as well; rank {speaker} tells more)"
        self._message = message  # an exception that comes from now on is of a rank that has ended for the same reason
        if speaks and not self._failed and self._act is end:
            _print(message)  # before anything else can end this process
            self._confirm_read(question, len(finding["ranks"]))
            end("")
        self._confirm_read(question, len(finding["ranks"]))
        self._conclude(message)

    def _confirm_read(self, question: int, readers: int) -> None:
        """Called by each rank that has read a verdict: wait until all have, for up to two seconds.

        A rank that ended at once would break the connections of the others before they read why. The store may end with rank 0,
        so that one leaves last.
        """
        with contextlib.suppress(StoreLostError):
            count = self._store.add(f"read/{question}", 1)
            deadline = time.monotonic() + 2.0
            while count < readers and time.monotonic() < deadline:
                time.sleep(0.02)
                count = self._store.add(f"read/{question}", 0)
        if self.rank == 0:
            time.sleep(0.1)

    def _conclude(self, message: str) -> None:
        self._message = self._message or message
        if not self._failed:  # else whoever caught the exception prints it
            self._act(message)
        self._over.set()

    def _position(self) -> str:
        """Where this rank is, as messages say it."""
        return describe({self.rank: self._own_answer()})[0]

    def _without_store(self) -> str:
        why = f"a collective failed ({self._failed[1]})" if self._failed else f"no progress for {self.timeout:g} s"
        return (
            f"shardcomp: {why}; the store of the process group at {self._store.address} does not answer, so the other ranks "
            f"cannot be asked: the process that hosts it, rank 0 or the launcher, died or is stopped\n  {self._position()}"
        )


def end(message: str) -> None:
    """Print a message and end this process with status 1, without waiting for its other threads."""
    if message:
        _print(message)
    _leave(1)


def _print(message: str) -> None:
    os.write(sys.stderr.fileno(), f"{message}\n".encode())  # one call: lines of several ranks stay whole


def _leave(status: int) -> NoReturn:
    """End the process. What it printed is flushed, unless another thread has locked the stream for a second."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), name="shardcomp-flush", daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(status)


def _default_sigterm(own_pipe: int | None = None) -> None:
    """Give SIGTERM its default again. A wake-up pipe other than `own_pipe` is left as it is."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pipe = signal.set_wakeup_fd(-1)
    if own_pipe is not None and pipe != own_pipe:
        signal.set_wakeup_fd(pipe)


def _in_child() -> None:
    """A forked process, such as one that loads data, has no watchdog and shares the parent's pipe."""
    if _handlers:
        _handlers.clear()
        _default_sigterm()


os.register_at_fork(after_in_child=_in_child)
