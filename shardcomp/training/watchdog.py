"""Ends a job in which a rank died or hangs, with a message that names the rank and the collective that the others wait in.

Every rank has a watchdog in a thread of its own, and says "progress" to it once a step. A watchdog that hears nothing for a
time-out asks those of all ranks, through the store of the process group, where they are; they read it from their Python stacks.
Until then a rank sends three small requests a second to the store, and nothing is recorded.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from shardcomp.training import stack_location
from shardcomp.training.stack_location import Place, listed

T = TypeVar("T")
K = TypeVar("K")

_NO_BEAT = "none"
_MOST = 12  # lines of a message
_made = 0  # how many watchdogs this process has had: those of one number are of one job
_handlers: list[Watchdog] = []  # those that SIGTERM is told to


class StoreLostError(Exception):
    """The store of the process group does not answer."""


class Watchdog:
    """Watches the progress of this rank, and with those of the other ranks finds out who holds up the job.

    Made by every rank once the process group runs; a context manager, whose end stops it. timeout: seconds without a `beat`
    after which the ranks are asked; below the time-out of the process group, which tells less. act: what is done with the
    message when a rank died or hangs, in the watchdog's thread; by default it is printed and the process ended with status 1,
    so that the launcher ends the job. It has the whole story on one rank and a line on the others. poll: seconds between two
    looks at the store, of a thousand ranks four seconds. grace: seconds in which a rank has to answer. Background threads whose
    name starts with one of `ignore` are not looked at.

    torchrun sends SIGTERM to all ranks as soon as one of them dies. If the program does not handle it, the watchdog does: the
    process ends as it would, but first tells who died.
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
        global _made
        _made += 1
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._poll = poll or max(1.0, self.size / 256)
        self._grace = grace or 2 * self._poll + 1.0
        self._act = act or end
        self._ignore = ignore
        self._last: tuple[str, float, int] = ("", time.monotonic(), threading.get_ident())
        self._failed: tuple[Place, str] | None = None  # where a collective failed on this rank, and how
        self._message = ""  # what was found, for this rank to say
        self._terminated = False
        self._stopped = False
        self._over = threading.Event()  # there is a verdict
        self._store = _Line(f"shardcomp-watchdog/{_made}", self._grace)
        self._asked = 0  # questions that were called off
        self._seen = (-1, time.monotonic())  # of the next rank: its signs of life, and when they last grew
        self._told = ""  # the beat that the store has
        self._awake, self._wakes = os.pipe()
        for end_of_pipe in (self._awake, self._wakes):
            os.set_blocking(end_of_pipe, False)
        self._store.ask(lambda store: store.set(f"host/{self.rank}", socket.gethostname()))
        self._handle_sigterm()
        atexit.register(self.stop)
        self._thread = threading.Thread(target=self._watch, name="shardcomp-watchdog", daemon=True)
        self._thread.start()

    # -- for the program -------------------------------------------------------------------------------------------------

    def beat(self, what: str) -> None:
        """Progress: `what` names it in messages, such as "step 17". Costs less than a microsecond."""
        self._last = (what, time.monotonic(), threading.get_ident())

    def explain(self, error: BaseException) -> str | None:
        """For an exception of a collective, as gloo and NCCL raise it where another rank is gone: who is gone or holds up the
        job, and where the others wait. Takes a few seconds. None where it is no such exception. This rank should end then."""
        if self._stopped or not stack_location.is_communication(error):
            return None
        if not self._message:
            self._failed = (stack_location.of_error(error), _first_line(error))
            self._wake()
        if not self._over.wait(4 * self._grace + 2.0):
            self._message = self._message or f"shardcomp: the other ranks could not be asked\n  {self._position()}"
        return self._message

    def stop(self, why: str = "") -> None:
        """End watching, as at the end of training. why: said to the others where they miss this rank."""
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
                said = why or f"it ended after {self._last[0] or 'no step'}"
                self._store.ask(lambda store: store.set(f"left/{self.rank}", said), 1.0)
                self._store.ask(lambda store: store.add("left", 1), 1.0)
        self._store.close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops it; prints `explain` of an exception that is leaving."""
        known = self._message
        if error is not None and (message := self.explain(error)) and message != known:
            _print(message)
        self.stop("" if error is None else f"{type(error).__name__}: {_first_line(error)}")

    # -- SIGTERM ---------------------------------------------------------------------------------------------------------

    def _handle_sigterm(self) -> None:
        """Take SIGTERM where nobody has. The byte that Python's own handler writes reaches the watchdog's thread even while the
        main one waits in a collective."""
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
        with contextlib.suppress(OSError):  # full: it wakes anyhow
            os.write(self._wakes, b"\0")

    def _sleep(self, seconds: float) -> None:
        if select.select([self._awake], [], [], seconds)[0]:
            try:
                told = os.read(self._awake, 4096)
            except BlockingIOError:
                return
            if signal.SIGTERM in told and self in _handlers and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                self._terminated = True

    def _watch(self) -> None:
        beat, idle, now = self._last, 0.0, time.monotonic()
        draw = random.Random()  # not the program's own generator, whose numbers are part of its checkpoints
        while not self._stopped and not self._over.is_set():
            self._sleep(self._poll * draw.uniform(0.8, 1.2))
            # Time in which this process did not run, as when a whole job is suspended, does not count.
            before, now = now, time.monotonic()
            idle = idle + min(now - before, 5 * self._poll) if beat is self._last else 0.0
            beat = self._last
            if self._stopped:
                return
            try:
                self._round("time" if idle > self.timeout else "")
            except StoreLostError:
                if self._failed or (idle > self.timeout and not self._terminated):
                    self._conclude(self._without_store())
                elif self._terminated:
                    _leave(128 + signal.SIGTERM)
            except Exception as error:  # a fault of the watchdog is no reason to end a job
                print(f"shardcomp: the watchdog of rank {self.rank} stopped: {error!r}", file=sys.stderr, flush=True)
                self._over.set()

    def _round(self, why: str) -> None:
        """One look at the store: show a sign of life, and answer or ask the question."""
        key = f"asked/{self._asked}"
        asked = self._store.ask(lambda store: store.add(key, 0))
        self._store.ask(lambda store: store.add(f"alive/{self.rank}", 1))
        if self.size > 1:
            signs = self._store.ask(lambda store: store.add(f"alive/{(self.rank + 1) % self.size}", 0))
            if signs != self._seen[0]:
                self._seen = (signs, time.monotonic())
        if self._last[0] != self._told:
            self._told = self._last[0]
            self._store.ask(lambda store: store.set(f"beat/{self.rank}", self._told))
        if self._failed:
            why = "a collective failed"
        elif self._terminated:
            why = "SIGTERM"
        if asked:
            self._answer()
            self._hear()
        elif why and self._store.ask(lambda store: store.add(key, 1)) == 1:
            self._answer()
            self._judge(why)

    def _answer(self) -> None:
        text, when, thread = self._last
        place, failure = self._failed or (stack_location.here(thread, self._ignore), "")
        answer = Answer(place, text, time.monotonic() - when, failure, time.monotonic() - self._seen[1])
        said = json.dumps(asdict(answer))
        self._store.ask(lambda store: store.set(f"answer/{self._asked}/{self.rank}", said))
        self._store.ask(lambda store: store.add(f"answers/{self._asked}", 1))

    def _judge(self, why: str) -> None:
        """Called on the rank that asked: wait for the answers, and say who holds up the job, or that nobody does."""
        began, beat, number = time.monotonic(), self._last, self._asked
        answers: dict[int, Answer] = {}
        gone: dict[int, Gone] = {}
        while True:
            late = time.monotonic() - began > self._grace
            heard = self._store.ask(lambda store: store.add(f"answers/{number}", 0) + store.add("left", 0))
            if late or heard >= self.size:
                said = {rank: self._get(f"answer/{number}/{rank}") for rank in range(self.size)}
                answers = {rank: Answer.read(text) for rank, text in said.items() if text is not None}
                passed = time.monotonic() - began
                gone = {rank: self._gone(rank, answers, passed) for rank, text in said.items() if text is None}
                if late or all(each.left for each in gone.values()):
                    break
            time.sleep(min(0.05, self._poll))
        broken = any(each.left is None for each in gone.values()) or any(each.failure for each in answers.values())
        off = (why == "SIGTERM" and not broken) or (why == "time" and beat is not self._last)
        reason = {"time": f"no progress for {self.timeout:g} s", "SIGTERM": "the job is being ended"}.get(why, why)
        found = {"off": off, "text": verdict(reason, answers, gone), "ranks": sorted(answers)}
        self._store.ask(lambda store: store.set(f"verdict/{number}", json.dumps(found)))
        self._take(found)

    def _gone(self, rank: int, answers: Mapping[int, Answer], passed: float) -> Gone:
        """passed: seconds since the answers were given, about."""
        before = answers.get((rank - 1) % self.size)
        host, beat, left = (self._get(f"{key}/{rank}") for key in ("host", "beat", "left"))
        return Gone(host, beat, before.next_silent + passed if before else None, left)

    def _hear(self) -> None:
        """Called on the others: wait for what the rank that asked finds."""
        began = time.monotonic()
        while time.monotonic() - began < 3 * self._grace + 1.0:
            if (said := self._get(f"verdict/{self._asked}")) is not None:
                return self._take(json.loads(said))
            time.sleep(min(0.05, self._poll))
        self._conclude(f"shardcomp: the rank that asked where the others are is gone itself\n  {self._position()}")

    def _take(self, found: dict[str, Any]) -> None:
        """Do what a verdict says."""
        number, speaker = self._asked, (found["ranks"] or [self.rank])[0]
        if found["off"]:
            self._asked += 1
            self._read(number, len(found["ranks"]))
            if self._terminated:
                _leave(128 + signal.SIGTERM)
            return
        whole = self.rank == speaker
        short = found["text"].splitlines()[0]
        message = found["text"] if whole else f"{short} (rank {self.rank} ends as well; rank {speaker} tells more)"
        self._message = message  # an exception that comes from now on is of a rank that has ended for the same reason
        if whole and not self._failed and self._act is end:
            _print(message)  # before anything else can end this process
            self._read(number, len(found["ranks"]))
            end("")
        self._read(number, len(found["ranks"]))
        self._conclude(message)

    def _read(self, number: int, readers: int) -> None:
        """Called by each rank that has read a verdict: waits for the others, so that none learns from a broken connection what
        a verdict would tell it. The store may end with rank 0, which leaves last."""
        with contextlib.suppress(StoreLostError):
            count = self._store.ask(lambda store: store.add(f"read/{number}", 1))
            until = time.monotonic() + 2.0
            while count < readers and time.monotonic() < until:
                time.sleep(0.02)
                count = self._store.ask(lambda store: store.add(f"read/{number}", 0))
        if self.rank == 0:
            time.sleep(0.1)

    def _conclude(self, message: str) -> None:
        self._message = self._message or message
        if not self._failed:  # else whoever caught the exception says it
            self._act(message)
        self._over.set()

    def _position(self) -> str:
        text, when, thread = self._last
        place, failure = self._failed or (stack_location.here(thread, self._ignore), "")
        return _told({self.rank: Answer(place, text, time.monotonic() - when, failure)})[0]

    def _without_store(self) -> str:
        why = f"a collective failed ({self._failed[1]})" if self._failed else f"no progress for {self.timeout:g} s"
        return (
            f"shardcomp: {why}; the store of the process group at {self._store.address} does not answer, so the other ranks "
            f"cannot be asked: the process that hosts it, rank 0 or the launcher, died or is stopped\n  {self._position()}"
        )

    def _get(self, key: str) -> str | None:
        return self._store.ask(lambda store: store.get(key).decode() if store.check([key]) else None)


@dataclass(frozen=True)
class Answer:
    """What a rank says when it is asked.

    beat, age: its last progress, and the seconds since. failure: how a collective failed on it. next_silent: the seconds since
    the rank after it showed its last sign of life.
    """

    place: Place
    beat: str
    age: float
    failure: str = ""
    next_silent: float = 0.0

    @staticmethod
    def read(said: str) -> Answer:
        """From the JSON that a rank wrote."""
        held = json.loads(said)
        return Answer(**{**held, "place": Place(**held["place"])})


@dataclass(frozen=True)
class Gone:
    """What is known of a rank that does not answer: its machine, its last progress, the seconds since its last sign of life,
    and where it stopped its watchdog, why."""

    host: str | None = None
    beat: str | None = None
    silent: float | None = None
    left: str | None = None


def verdict(reason: str, answers: Mapping[int, Answer], gone: Mapping[int, Gone]) -> str:
    """The message: on its first line who holds up the job, then where all others are.

    reason: why the ranks were asked. gone: the ranks that do not answer.
    """
    every = answers
    busy = {rank: answer for rank, answer in answers.items() if answer.place.kind == "code"}
    waiting = {rank: answer for rank, answer in answers.items() if rank not in busy}
    ops = [answer.place.what for answer in waiting.values()]
    usual = max(ops, key=ops.count, default="")
    others = [rank for rank, answer in waiting.items() if answer.place.what != usual and answer.place.kind == "collective"]
    if gone:
        culprits = _missing(gone)
    elif busy:
        culprits, answers = [f"held up by {text}" for text in _told(busy)], waiting
    elif others and not any(answer.failure for answer in answers.values()):
        culprits = [f"all wait, but {_ranks(others)} in another collective than the rest: their programs went apart"]
    else:
        culprits = ["all ranks answer, and wait in one collective: the network or a device does not deliver"]
    failures = _alike({rank: answer.failure for rank, answer in every.items() if answer.failure})
    lines = [f"  {line}" for line in _told(answers)]
    if len(lines) > _MOST:
        lines = [*lines[:_MOST], f"  and {len(lines) - _MOST} more lines of other ranks"]
    lines += [f"  what failed on {_ranks(ranks)}: {failure}" for failure, ranks in list(failures.items())[:3]]
    return "\n".join([f"shardcomp: {reason}; {'; '.join(culprits)}", *lines])


def _missing(gone: Mapping[int, Gone]) -> list[str]:
    """Who does not answer, those of whom the same is known together."""
    found = []
    left = {rank: each.left for rank, each in gone.items() if each.left is not None}
    found += [f"{_ranks(ranks)} left: {why}" for why, ranks in _alike(left).items()]
    never = [rank for rank, each in gone.items() if each.left is None and each.host is None]
    if never:
        found.append(f"no answer from {_ranks(never)}, where no watchdog was started")
    died = {rank: (each.host, each.beat) for rank, each in gone.items() if each.left is None and each.host is not None}
    for (machine, beat), ranks in _alike(died).items():
        known = [silent for rank in ranks if (silent := gone[rank].silent) is not None]
        ago = f"last sign of life {max(known):.0f} s ago, " if known else ""
        found.append(
            f"no answer from {_ranks(ranks)} on {machine}: died or is stopped; {ago}last known beat: {beat or _NO_BEAT}"
        )
    return found


def _told(answers: Mapping[int, Answer]) -> list[str]:
    """Where ranks are, those that are at one place together."""
    found = []
    for text, ranks in _alike({rank: _at(answer) for rank, answer in answers.items()}).items():
        beats = dict.fromkeys(answers[rank].beat or _NO_BEAT for rank in ranks)
        since = max(answers[rank].age for rank in ranks)
        found.append(f"{_ranks(ranks)} {text}; last beat: {' and '.join([*beats][:3])}, {since:.0f} s ago")
    return found


def _at(answer: Answer) -> str:
    if answer.place.kind == "code":
        return f"at {answer.place}, not in a collective"
    return f"waiting {'in' if answer.place.kind == 'collective' else 'for'} {answer.place}"


def _alike(told: Mapping[int, K]) -> dict[K, list[int]]:
    """The ranks of which the same is said."""
    found: dict[K, list[int]] = {}
    for rank, text in told.items():
        found.setdefault(text, []).append(rank)
    return found


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"


def _first_line(error: BaseException) -> str:
    """What an exception says, without gloo's source file, address and advice."""
    text = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip().partition("\n")[0])
    return re.sub(r" ?\[\S+\]:\d+", "", text.partition(". This is typically")[0])[:300]


def end(message: str) -> None:
    """Print a message and end this process with status 1, whatever its other threads do."""
    if message:
        _print(message)
    _leave(1)


def _print(message: str) -> None:
    os.write(sys.stderr.fileno(), f"{message}\n".encode())  # one call: lines of several ranks stay whole


def _leave(status: int) -> NoReturn:
    """End the process. What it printed is flushed, unless another thread holds the stream."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), name="shardcomp-flush", daemon=True)
    flush.start()
    flush.join(1.0)
    os._exit(status)


class _Line:
    """A connection of its own to the store of the process group. Each request ends within a time limit, in seconds: the client
    of a store whose host is stopped waits for ever."""

    def __init__(self, prefix: str, limit: float) -> None:
        default = _get_default_store()
        held = default
        while isinstance(held, dist.PrefixStore):
            held = held.underlying_store
        self.address = f"{held.host}:{held.port}" if isinstance(held, dist.TCPStore) else type(held).__name__
        # A clone keeps the prefixes, one of which counts the launcher's restarts.
        own = default.clone() if isinstance(held, dist.TCPStore) else default
        self._store = dist.PrefixStore(prefix, own)
        self._limit = limit
        self._lost = False
        self._requests: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="shardcomp-watchdog-store", daemon=True).start()

    def ask(self, request: Callable[[Any], T], limit: float | None = None) -> T:
        """What `request(store)` returns. Raises StoreLostError where the store fails or takes longer than `limit`."""
        if self._lost:
            raise StoreLostError
        reply: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._requests.put((request, reply))
        try:
            done, value = reply.get(timeout=limit or self._limit)
        except queue.Empty:
            done, value = False, None
        if not done:
            self._lost = True
            raise StoreLostError from value
        return value

    def close(self) -> None:
        """Take no more requests."""
        self._lost = True
        self._requests.put(None)

    def _serve(self) -> None:
        while (entry := self._requests.get()) is not None:
            request, reply = entry
            try:
                reply.put((True, request(self._store)))
            except Exception as error:
                reply.put((False, error))


def _default_sigterm(mine: int | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other = signal.set_wakeup_fd(-1)
    if mine is not None and other != mine:
        signal.set_wakeup_fd(other)


def _in_child() -> None:
    """A forked process, such as one that loads data, has no watchdog and shares the parent's pipe."""
    if _handlers:
        _handlers.clear()
        _default_sigterm()


os.register_at_fork(after_in_child=_in_child)
