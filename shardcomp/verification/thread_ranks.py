"""Ranks as threads of one process, or one rank alone: what verification runs a plan on.

Nothing else uses torch's threaded process group, which is private.
"""

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
from shardcomp.torch_private import distributed_c10d

T = TypeVar("T")
GRACE = 20.0
"""Seconds that the other ranks have to end once one has failed. A rank that waits for a new group does not learn of it."""
_lock = threading.Lock()


def run_ranks(world_size: int, function: Callable[[int], T], timeout: float = 600.0) -> list[T]:
    """Call `function(rank)` on every rank at once, each in a thread with a process group of `world_size`.

    Args:
        world_size: how many ranks.
        function: what a rank does.
        timeout: seconds after which ranks that have not ended are taken to hang.

    Returns:
        The results in order of rank.

    Raises:
        ShardError: one that a rank raised. The other ranks are ended.
        VerifyError: another exception of a rank, with its traceback; or ranks that hang.

    Example:
        >>> def reduce(rank):
        ...     tensor = torch.tensor([float(rank)])
        ...     dist.all_reduce(tensor)
        ...     return tensor.item()
        >>> run_ranks(3, reduce)
        [3.0, 3.0, 3.0]
    """
    # Imported here, since it loads torch.testing, which only verification needs.
    from shardcomp.torch_private import multi_threaded_pg as threaded

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
            threaded.ProcessLocalGroup.exception_handle(failure)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    with _lock:
        threaded._install_threaded_pg()
        isolated = distributed_c10d._set_thread_isolation_mode
        isolated(True)
        _add_mail(threaded.ProcessLocalGroup)
        if not hasattr(threaded.ThreadLocalWorld, "comms"):  # torch 2.11 ends a group with these, and threads have none
            threaded.ThreadLocalWorld.comms = property(lambda world: [])
        try:
            threaded.ProcessLocalGroup.reset()
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
                alive = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
                raise VerifyError(f"ranks {alive} hang after {timeout:.0f} s")
        finally:
            isolated(False)
            threaded._uninstall_threaded_pg()
    if failures:
        rank, (failure, text) = _first(failures)
        if isinstance(failure, ShardError):
            raise failure
        raise VerifyError(f"rank {rank} failed:\n{text}") from failure
    return [results[rank] for rank in range(world_size)]


def run_alone(world_size: int, function: Callable[[int], T]) -> list[T]:
    """Call `function(0)` in this thread, as the only rank. This is how a plan runs on a GPU.

    `function` starts the process group itself, and it is ended afterwards. Exceptions are raised as by `run_ranks`.
    """
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
    """The failure that caused the others, and its rank. The others only report that a peer is gone."""
    causes = {rank: failure for rank, failure in failures.items() if not isinstance(failure[0], SystemExit)}
    return min((causes or failures).items())


class _Box:
    """Messages from one rank to another. The n-th receive gets the n-th message, in whatever order receives are waited for."""

    def __init__(self) -> None:
        self.filled = threading.Condition()
        self.messages: dict[int, Tensor] = {}
        self.sent = self.asked = 0

    def put(self, tensor: Tensor) -> None:
        with self.filled:
            self.messages[self.sent] = tensor
            self.sent += 1
            self.filled.notify_all()

    def ask(self) -> int:
        with self.filled:
            self.asked += 1
            return self.asked - 1


class _Sent:
    """The handle of a send. The message is in its box, so there is nothing to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Awaited:
    """The handle of a receive into the tensor `into`."""

    def __init__(self, box: _Box, into: Tensor, ended: threading.Event) -> None:
        self.box, self.into, self.ended, self.number = box, into, ended, box.ask()

    def wait(self, timeout: Any = None) -> bool:
        with self.box.filled:
            while self.number not in self.box.messages:
                self.box.filled.wait(0.05)
                if self.ended.is_set():
                    sys.exit("another rank failed")
            arrived = self.box.messages.pop(self.number)
        with torch.no_grad():
            self.into.copy_(arrived)
        return True


def _add_mail(group_class: Any) -> None:
    """Give torch's threaded process group what it lacks: send and receive. torch 2.14 also asks for its backend before sending:
    one that cannot send several messages as one."""
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
