"""Runs ranks that die, hang or are slow, for test_watchdog.py. Reads what to run from standard input, one JSON object a line.

One process imports torch and forks the ranks of each run: on a small machine the imports cost more than the runs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from shardcomp.ir.collectives import Axis
from shardcomp.runtime import Blueprint, build
from shardcomp.training.watchdog import Watchdog

FOREVER = 1000.0
TIMEOUT = 1.5
BLUEPRINTS: dict[str, Blueprint] = {}


def slow() -> None:
    time.sleep(FOREVER)  # here: slow


def leave_a_note(message: str) -> None:
    print("own act:", message, file=sys.stderr, flush=True)
    os._exit(3)


def plain(rank: int, size: int, what: str) -> None:
    """Steps of one all-reduce over dp. At the third, rank 1 does `what`."""
    dp = Axis("dp", size, rank, dist.group.WORLD)
    x = torch.ones(4)
    act = leave_a_note if what == "stopped" else None
    with Watchdog(FOREVER if what in ("launcher", "ended") else TIMEOUT, poll=0.2, grace=2.0, act=act) as watchdog:
        for step in range(4):
            if step == 3:
                time.sleep(0.5)  # the beats are told to the store
                if rank == 1 and what in ("killed", "launcher"):
                    os.kill(os.getpid(), signal.SIGKILL)
                elif rank == 1 and what == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif rank == 1 and what == "slow":
                    slow()
                elif rank == 1 and what == "raises":
                    raise ValueError("bad batch")
                elif rank == 1 and what == "elsewhere":
                    dist.recv(x, src=0)  # here: elsewhere
                elif rank == 0 and what in ("host", "host, unnoticed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if what in ("launcher", "host, unnoticed", "ended"):  # nobody waits for the rank that died
                    dist.recv(x, src={"launcher": 2, "host, unnoticed": 3, "ended": 1}[what] - rank)
            dp.all_reduce(x)  # here: all_reduce
            watchdog.beat(f"step {step}")


def steady(rank: int, size: int, what: str) -> None:
    """Slow steps; rank 0 ends a child of its own by SIGTERM and leaves last."""
    x = torch.ones(4)
    with Watchdog(2.0, poll=0.1, grace=2.0) as watchdog:
        if rank == 0:
            child = os.fork()
            if child == 0:
                time.sleep(FOREVER)
            time.sleep(0.2)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
        for step in range(6):
            time.sleep(0.6 if rank == step % 2 else 0.0)
            dist.all_reduce(x)
            watchdog.beat(f"step {step}")
        time.sleep(0.5 * (1 - rank))


def sharded(rank: int, size: int, what: str) -> None:
    """A sharded model, of which rank 1 sleeps before its call, within it, or before its backward."""
    model = build(BLUEPRINTS[what], weights)
    ids = torch.arange(32).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    dist.barrier()
    with Watchdog(TIMEOUT, poll=0.2, grace=2.0) as watchdog:
        watchdog.beat("step 1")
        if rank == 1 and what == "compared":
            slow()
        if rank == 1 and what in ("forward", "zero"):
            model._stage_shards[0].root.register_forward_pre_hook(lambda *given: slow())
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=32).loss  # here: forward
        if rank == 1:
            slow()
        loss.backward()  # here: backward


def lower(what: str) -> Blueprint:
    """Before the fork, once for all ranks, in a process of its own: where torch is built with CUDA, one that has been through a
    backward cannot be forked."""
    import shardcomp
    from support.models import tiny

    degrees = {"data": 2, "zero": 3} if what == "zero" else {"tensor": 2}
    policy = shardcomp.Policy.load("llama", precision="fp32", **degrees)
    return shardcomp.lower(tiny(), policy, 2, seq=16).blueprint()


def weights(name: str, index: tuple[slice, ...]) -> torch.Tensor:
    return torch.ones([part.stop - part.start for part in index])


def rank_process(rank: int, size: int, port: int, what: str, folder: Path) -> int:
    """What a forked rank does. Returns its exit status."""
    log = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    try:
        dist.init_process_group("gloo")
        run = {"steady": steady, "forward": sharded, "backward": sharded, "zero": sharded, "compared": sharded}.get(what, plain)
        run(rank, size, what)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(what: str, size: int, folder: Path, limit: float) -> dict:
    """Fork the ranks and wait for them, killing those that are left after `limit` seconds or are stopped."""
    if what in ("forward", "backward", "zero", "compared") and what not in BLUEPRINTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as alone:
            made = alone.submit(lower, what).result()
        BLUEPRINTS.update(dict.fromkeys(["zero"] if what == "zero" else ["forward", "backward", "compared"], made))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    ranks = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os._exit(rank_process(rank, size, port, what, folder))
        ranks[child] = rank
    statuses, told, left = {}, False, dict(ranks)
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[left.pop(child)] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if not told and ((what == "launcher" and statuses) or (what == "ended" and seconds > 2.0)):
            told = True
            for each in left:  # as torchrun does
                os.kill(each, signal.SIGTERM)
        if seconds > limit or (what == "stopped" and len(left) == 1):
            for each in left:
                os.kill(each, signal.SIGKILL)
        time.sleep(0.02)
    return {"statuses": [statuses[rank] for rank in range(size)], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["what"], asked["size"], Path(asked["folder"]), asked["limit"])), flush=True)
