"""Checkpoints of a run in progress, on torch.distributed.checkpoint: model, optimizer, schedule, random numbers, position.

A checkpoint appears complete or not at all, is checked byte by byte when it is loaded, and loads under any other tensor,
pipeline and data degree, schedule, ZeRO stage and precision. Nothing in it is pickled.

    saver = checkpoint.Saver("runs/7b", keep=3)                        # one job to a directory
    restored = saver.resume(sharded, optimizer, scheduler=scheduler)   # the newest good one, or None
    ...
    saver.save(sharded, optimizer, step=step, scheduler=scheduler, extra={"position": position})
    saver.close()
"""

from __future__ import annotations

from shardcomp.checkpoint.api import Restored, load, save, verify
from shardcomp.checkpoint.directory import checkpoints, latest
from shardcomp.checkpoint.saver import Saver

__all__ = ["Restored", "Saver", "checkpoints", "latest", "load", "save", "verify"]
