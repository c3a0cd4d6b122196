"""A connection to the store of the process group whose requests end in time, even if the store's host does not answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shardcomp.torch_private import default_store

T = TypeVar("T")


class StoreLostError(Exception):
    """The store of the process group does not answer."""


class StoreClient:
    """A connection of its own to the store of the process group.

    torch's client waits for ever for a store whose host is stopped. So a thread does the requests, and who asks waits for it no
    longer than the time limit. Once a request has failed, all later ones fail at once.

    Args:
        prefix: what the keys begin with.
        limit: seconds that a request may take.
    """

    def __init__(self, prefix: str, limit: float) -> None:
        default = default_store()
        store = default
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        self.address = f"{store.host}:{store.port}" if isinstance(store, dist.TCPStore) else type(store).__name__
        # Cloned from the outermost store, so that it has all prefixes: one of them counts the launcher's restarts.
        own = default.clone() if isinstance(store, dist.TCPStore) else default
        self._store = dist.PrefixStore(prefix, own)
        self._limit = limit
        self._lost = False
        self._requests: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="shardcomp-watchdog-store", daemon=True).start()

    def ask(self, request: Callable[[Any], T], limit: float | None = None) -> T:
        """Return what `request(store)` returns. Raises StoreLostError if the store fails or takes longer than `limit`."""
        if self._lost:
            raise StoreLostError
        reply: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._requests.put((request, reply))
        try:
            succeeded, result = reply.get(timeout=limit or self._limit)
        except queue.Empty:
            succeeded, result = False, None
        if not succeeded:
            self._lost = True
            raise StoreLostError from result
        return result

    def get(self, key: str) -> str | None:
        """The text at a key, or None if nobody has set it."""
        return self.ask(lambda store: store.get(key).decode() if store.check([key]) else None)

    def set(self, key: str, text: str, limit: float | None = None) -> None:
        self.ask(lambda store: store.set(key, text), limit)

    def add(self, key: str, amount: int, limit: float | None = None) -> int:
        """Add to the number at a key, and return the sum. An amount of 0 reads it."""
        return self.ask(lambda store: store.add(key, amount), limit)

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
