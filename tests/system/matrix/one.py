"""What one pair of releases makes of each kind of model, as a JSON object per line. `matrix.run` starts it where these are."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

import shardcomp
from shardcomp.errors import PolicyError
from shardcomp.ir.program import Program
from shardcomp.lowered import Lowered
from shardcomp.lowering import lower
from shardcomp.policy import Policy
from support.families import families, tiny_config


def main() -> None:
    """The kinds to run and the seconds that each may take come as JSON on stdin."""
    asked = json.load(sys.stdin)
    known = families()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # transformers prints to stdout too
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name in asked["models"]:
        began = time.perf_counter()
        found = _apart(name, asked["seconds"]) if name in known else {"absent": True}
        found |= {"model": name, "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(found), file=results, flush=True)


def _apart(name: str, seconds: float) -> dict[str, Any]:
    """The result of one kind, computed in a process of its own, which may crash or hang."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send, args=(sender, name))
    child.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return {"error": f"not done after {seconds:g} s"}
    except EOFError:
        child.join()
        return {"error": f"the process ended with code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _send(sender: Connection, name: str) -> None:
    try:
        sender.send(result(name))
    except Exception as error:
        sender.send({"error": f"{type(error).__name__}: {error}"})


def result(name: str) -> dict[str, Any]:
    """Capture in bf16, as training does, with the operators and the listing of that; and verify in float64."""
    config = tiny_config(name)
    lowered, unfit = _lowered(config)
    policy = lowered.policy
    found = _captured(lowered.records[0].program) | {"unfit": unfit, "listing": lowered.listing()}
    found["policy"] = policy.name if policy.options.tensor > 1 else None
    if any(degraded.startswith("self-check: ") for degraded in found["degraded"]):
        return found | {"unverified": "the model itself fails"}
    verified = shardcomp.verify(config, policy.replace(precision="fp64"), shrink={"none": True})
    return found | {"ok": verified.ok, "deviation": max(verified.deviation.values()), "worst": verified.worst}


def _lowered(config: Any) -> tuple[Lowered, list[str]]:
    """Under the policy of the model's family, or else under the one that is derived from the model. Where neither fits, under
    one that splits nothing: the captured model is compared with the dense one all the same. And why policies do not fit."""
    unfit = []
    for load in (Policy.for_model, lambda _: Policy.load("auto")):
        try:
            policy = load(config.model_type)
        except PolicyError:
            continue  # there is none
        try:
            return lower(config, policy.replace(tensor=2, precision="bf16"), seq=24), unfit
        except PolicyError as error:
            unfit.append(str(error))
    return lower(config, Policy(config.model_type, asked={"precision": "bf16"}), seq=24), unfit


def _captured(program: Program) -> dict[str, Any]:
    counts = Counter(_operator(node.target) for body in program.bodies() for node in body.calls())
    return {
        "capture": "dynamic" if program.static_shape is None else "static",
        "degraded": [f"{degraded.what}: {degraded.why}" for degraded in program.degraded],
        "operators": dict(sorted(counts.items())),
    }


def _operator(target: Any) -> str:
    return str(target) if hasattr(target, "_schema") else target.__name__


if __name__ == "__main__":
    main()
