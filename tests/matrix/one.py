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
from families import families, tiny_config

import shardcomp
from shardcomp import presets
from shardcomp.capture import capture
from shardcomp.errors import PolicyError
from shardcomp.lowering import TRAINING, lower
from shardcomp.policy import Policy
from shardcomp.program import Program


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
    policy = _policy(config, precision="bf16")
    if policy is None:
        program = capture(presets.build(config), TRAINING, precision="bf16")
        capture(presets.build(config), TRAINING, precision="fp64")
        return _captured(program) | {"unverified": "no policy"}
    lowered = lower(config, policy, seq=24)
    found = _captured(lowered.records[0].program) | {"policy": policy.name, "listing": lowered.listing()}
    if any(degraded.startswith("self-check: ") for degraded in found["degraded"]):
        return found | {"unverified": "the model itself fails"}
    verified = shardcomp.verify(config, policy.replace(precision="fp64"), shrink={"none": True})
    return found | {"ok": verified.ok, "deviation": max(verified.deviation.values()), "worst": verified.worst}


def _policy(config: Any, **options: Any) -> Policy | None:
    """The policy that is derived from the model, or else that of its family."""
    for load in (lambda: Policy.load("auto", tensor=2, **options), lambda: _own_policy(config, **options)):
        try:
            return load()
        except PolicyError:
            continue
    return None


def _own_policy(config: Any, **options: Any) -> Policy:
    return Policy.for_model(config.model_type).replace(tensor=2, **options)


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
