"""Which storages a piece of code makes, and which of them are still held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Every storage that an operator makes, held weakly: those that are left are held by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage(held) for held in tree_leaves((args, kwargs)) if isinstance(held, Tensor)}
        for held in tree_leaves(result):
            if isinstance(held, Tensor) and storage(held) not in given:
                self.found[storage(held)] = StorageWeakRef(held.untyped_storage()), held.untyped_storage().nbytes()
        return result

    def left(self, without: list[Tensor]) -> int:
        """The bytes of those that still live, but for some."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # until then, a slower thread may hold what was sent last
        known = {storage(held) for held in without}
        return sum(size for key, (ref, size) in self.found.items() if not ref.expired() and key not in known)


def storage(held: Tensor) -> int:
    return int(held.untyped_storage()._cdata)
