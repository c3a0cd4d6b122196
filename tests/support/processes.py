"""Ranks that are processes, forked from a server that has imported torch, transformers and shardcomp once."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 600
"""Seconds."""


def run_processes(work: Callable[..., None], count: int, folder: Path, *arguments: Any) -> None:
    """Call `work(rank, folder, *arguments)`, a function of a module, in each process of a gloo group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shardcomp.verification.resumption", "transformers.models.llama.modeling_llama"])
    processes = [
        context.Process(target=_rank, args=(work, rank, count, folder, arguments), daemon=True) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    failures = [path.read_text() for path in sorted(folder.glob("failed-*.txt"))]
    assert codes == [0] * count, "\n".join(failures) or codes


def _rank(work: Callable[..., None], rank: int, count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        work(rank, folder, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}.txt").write_text(f"rank {rank} failed:\n{traceback.format_exc()}")
        raise
