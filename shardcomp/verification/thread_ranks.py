"""Ranks as threads of one process, or one rank alone: what verification runs a plan on. The only user of torch's threaded
process group."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shardcomp.errors import ShardError, VerifyError

T = TypeVar("T")
GRACE = 20.0
"""Seconds that the other ranks have to end once one has failed; who waits for a new group does not learn of it."""
_lock = threading.Lock()


def run_ranks(world_size: int, function: Callable[[int], T], timeout: float = 600.0) -> list[T]:
    """Call `function(rank)` on every rank at once, each in a thread that has a process group of `world_size`.

    Returns the results in order of rank. An exception of any rank ends the others and is raised here: a ShardError as it is,
    any other as a VerifyError that holds the rank's traceback.
    """
    from torch.testing._internal.distributed.multi_threaded_pg import (
        ProcessLocalGroup,
        ThreadLocalWorld,
        _install_threaded_pg,
        _uninstall_threaded_pg,
    )

    if dist.is_initialized():
        raise VerifyError("ranks as threads need a process without a process group of its own")
    results: dict[int, T] = {}
    failures: dict[int, tuple[BaseException, str]] = {}

    def work(rank: int, store: dist.Store) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = function(rank)
        except BaseException as failure:
            failures[rank] = (failure, traceback.format_exc())
            ProcessLocalGroup.exception_handle(failure)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    with _lock:
        _install_threaded_pg()
        isolated = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
        isolated(True)
        _add_mail(ProcessLocalGroup)
        if not hasattr(ThreadLocalWorld, "comms"):  # torch 2.11 ends a group with these, and threads have none
            ThreadLocalWorld.comms = property(lambda world: [])
        try:
            ProcessLocalGroup.reset()
            store = dist.HashStore()
            threads = [threading.Thread(target=work, args=(rank, store), daemon=True) for rank in range(world_size)]
            for thread in threads:
                thread.start()
            end = time.monotonic() + timeout
            for thread in threads:
                while thread.is_alive() and time.monotonic() < end:
                    thread.join(0.2)
                    if failures:
                        end = min(end, time.monotonic() + GRACE)
            if any(thread.is_alive() for thread in threads) and not failures:
                raise VerifyError(f"ranks {[i for i, t in enumerate(threads) if t.is_alive()]} hang after {timeout:.0f} s")
        finally:
            isolated(False)
            _uninstall_threaded_pg()
    if failures:
        rank, (failure, text) = _first(failures)
        if isinstance(failure, ShardError):
            raise failure
        raise VerifyError(f"rank {rank} failed:\n{text}") from failure
    return [results[rank] for rank in range(world_size)]


def run_alone(world_size: int, function: Callable[[int], T]) -> list[T]:
    """Call `function(0)` as the only rank, in this thread, under the process group that it starts, which is ended afterwards:
    how a plan runs on a GPU. An exception is raised as `run_ranks` does."""
    if dist.is_initialized():
        raise VerifyError("a rank alone needs a process without a process group of its own")
    try:
        return [function(rank) for rank in range(world_size)]
    except ShardError:
        raise
    except Exception as failure:
        raise VerifyError(f"rank 0 failed:\n{traceback.format_exc()}") from failure
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _first(failures: dict[int, tuple[BaseException, str]]) -> tuple[int, tuple[BaseException, str]]:
    """The failure that caused the others, which only report that a peer is gone."""
    causes = {rank: failure for rank, failure in failures.items() if not isinstance(failure[0], SystemExit)}
    return min((causes or failures).items())


class _Box:
    """Messages from one rank to another: the n-th that is sent is the n-th that is asked for, whatever is waited for first."""

    def __init__(self) -> None:
        self.filled = threading.Condition()
        self.held: dict[int, Tensor] = {}
        self.sent = self.asked = 0

    def put(self, tensor: Tensor) -> None:
        with self.filled:
            self.held[self.sent] = tensor
            self.sent += 1
            self.filled.notify_all()

    def ask(self) -> int:
        with self.filled:
            self.asked += 1
            return self.asked - 1


class _Sent:
    """A message that was put into its box: there is nothing to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Awaited:
    """A message that will arrive in `into`."""

    def __init__(self, box: _Box, into: Tensor, ended: threading.Event) -> None:
        self.box, self.into, self.ended, self.place = box, into, ended, box.ask()

    def wait(self, timeout: Any = None) -> bool:
        with self.box.filled:
            while self.place not in self.box.held:
                self.box.filled.wait(0.05)
                if self.ended.is_set():
                    sys.exit("another rank failed")
            arrived = self.box.held.pop(self.place)
        with torch.no_grad():
            self.into.copy_(arrived)
        return True


def _add_mail(group_class: Any) -> None:
    """Give torch's threaded process group messages from one rank to another, which it lacks, and what torch 2.14 asks before it
    sends some: a backend, which has no way to send several as one."""
    boxes: defaultdict[tuple[str, int, int, int], _Box] = defaultdict(_Box)
    lock = threading.Lock()

    def box(group: Any, source: int, destination: int, tag: int) -> _Box:
        with lock:
            return boxes[group.pg_name, source, destination, tag]

    def send(self: Any, tensors: list[Tensor], destination: int, tag: int = 0) -> _Sent:
        [tensor] = tensors
        box(self, self._rank, destination, tag).put(tensor.detach().clone())
        return _Sent()

    def recv(self: Any, tensors: list[Tensor], source: int, tag: int = 0) -> _Awaited:
        [tensor] = tensors
        return _Awaited(box(self, source, self._rank, tag), tensor, group_class._terminate)

    group_class.send, group_class.recv = send, recv
    group_class._get_backend = lambda self, device: self
