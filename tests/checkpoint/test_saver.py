"""The checkpoints of a run, by real processes: written beside the training, one at a time; a save that fails harms nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPT = """
import json, os, resource, shutil, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from support.models import tiny
import shardcomp
from shardcomp import CheckpointError, checkpoint, presets
from shardcomp.checkpoint import directory
from shardcomp.training.stack_location import is_communication, of_error

root = Path(sys.argv[1])
policy = shardcomp.Policy.load("llama", data=2, zero=3, precision="fp32")
sharded = shardcomp.shard(presets.build(tiny(tie_word_embeddings=True)), policy)
optimizer = shardcomp.AdamW(sharded.parameters(), lr=1e-2)
rank, found = dist.get_rank(), {}

def step():
    tokens = torch.arange(16).view(2, 8) + sharded.mesh["dp"].get_local_rank()
    loss = sharded.train_step(input_ids=tokens, labels=tokens).loss
    sharded.optimizer_step(optimizer)
    optimizer.zero_grad()
    return float(loss)

lines = []
saver = checkpoint.Saver(root / "run", keep=2, export=True, say=lines.append)
step()
saver.save(sharded, optimizer, step=1)
checkpoint.save(root / "copy", sharded, optimizer, step=1)   # the same moment, while the other is in flight
found["later"] = [step() for _ in range(3)]                    # the copies are not disturbed by training
saver.wait()
found["same"] = directory.read_sums(root / "run/step-00000001") == directory.read_sums(root / "copy")
for number in (2, 3, 4):
    saver.save(sharded, optimizer, step=number)
saver.wait()
found["kept"] = sorted(path.name for path in (root / "run").iterdir())
found["exports"] = sorted(path.name for path in (root / "run/huggingface").iterdir())
try:
    checkpoint.Saver(root / "run")
except CheckpointError as problem:
    found["second"] = str(problem)

# The disk of one rank is full: all ranks are told which, what was there stays, and the next save is well.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if rank == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for asynchronous in (True, False):
    saver.asynchronous = asynchronous
    try:
        saver.save(sharded, optimizer, step=5)
        saver.wait()
    except CheckpointError as problem:
        found[f"full {asynchronous}"] = str(problem)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
found["after"] = sorted(path.name for path in (root / "run").iterdir())
saver.asynchronous = True
saver.save(sharded, optimizer, step=6)
saver.wait()

# Damage, and a run that goes on.
saver.close()
if rank == 0:
    path = root / "run/step-00000006/config.json"
    path.write_bytes(path.read_bytes() + b" ")
    (root / "run/.step-00000007.partial").mkdir()
dist.barrier()
again = checkpoint.Saver(root / "run", say=lines.append)
resumed = again.resume(sharded, optimizer)
found["resumed"] = resumed.step
found["renamed"] = sorted(path.name for path in (root / "run").iterdir())
earlier = again.resume(sharded, optimizer, path=root / "copy")
found["superseded"] = sorted(path.name for path in (root / "run").iterdir())
found["earlier"] = earlier.step
again.close()
empty = checkpoint.Saver(root / "empty")
found["nothing"] = empty.resume(sharded, optimizer)
if rank == 0:
    shutil.rmtree(root / "empty")
dist.barrier()
empty.save(sharded, optimizer, step=8)  # a directory that vanished is made again
empty.close()
found["made"] = (root / "empty/step-00000008/SHA256SUMS").exists()
found["lines"] = lines

# A rank that dies within a save: what the others are told is that, for the watchdog to name it, and not that a save failed.
last = checkpoint.Saver(root / "last")
(root / f"found-{rank}.json").write_text(json.dumps(found))
if rank == 1:
    checkpoint.saver.write = lambda *given: os._exit(0)
last.save(sharded, optimizer, step=9)
try:
    last.close()
except Exception as problem:
    (root / "lost.txt").write_text(f"{type(problem).__name__}: {is_communication(problem)}, {of_error(problem).what}")
os._exit(0)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saver")
    (root / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [*launch, str(root / "script.py"), str(root)],
        env={**os.environ, "PYTHONPATH": f"{here}:{here / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module", params=[0, 1])
def found(root: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(json.loads((root / f"found-{request.param}.json").read_text()))


def test_a_save_in_flight_is_of_the_moment_at_which_it_was_asked_for(found: dict[str, Any]) -> None:
    assert found["same"] and found["later"] == sorted(found["later"], reverse=True)


def test_the_last_two_are_kept_and_so_are_their_exports(found: dict[str, Any]) -> None:
    assert found["kept"] == [".lock", "huggingface", "step-00000003", "step-00000004"]
    assert found["exports"] == ["step-00000003", "step-00000004"]


def test_a_second_job_is_refused_on_every_rank(found: dict[str, Any]) -> None:
    assert "is in use by process" in found["second"]


def test_a_full_disk_is_told_on_every_rank_and_harms_nothing(found: dict[str, Any]) -> None:
    for asynchronous in (True, False):
        said = found[f"full {asynchronous}"]
        assert "step-00000005: not saved: rank 1: OSError: [Errno 27] File too large" in said, said
    assert found["after"] == found["kept"]


def test_a_run_goes_on_from_the_last_that_is_good_and_renames_the_others(found: dict[str, Any]) -> None:
    assert found["resumed"] == 4
    assert found["renamed"] == [".lock", "damaged-step-00000006", "huggingface", "step-00000004"]
    assert found["earlier"] == 1
    assert found["superseded"] == [".lock", "damaged-step-00000006", "huggingface", "superseded-step-00000004"]
    assert found["nothing"] is None and found["made"]


def test_only_the_first_rank_says_so_a_line_each(root: Path) -> None:
    lines, none = (json.loads((root / f"found-{rank}.json").read_text())["lines"] for rank in (0, 1))
    assert not none and len(lines) == 4
    for line, part in zip(lines, [".step-00000007.partial", "config.json is damaged", "damaged-", "superseded-"], strict=True):
        assert part in line


def test_an_export_is_the_checkpoints_weights(root: Path) -> None:
    exported = root / "run/huggingface/step-00000004"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((root / "run/superseded-step-00000004").glob("rank-*.safetensors")):
        for key, held in load_file(file).items():
            if key.startswith("model/"):
                weights.setdefault(key.partition("@")[0][6:], torch.empty(0))
                weights[key.partition("@")[0][6:]] = torch.cat([weights[key.partition("@")[0][6:]], held.flatten()])
    state = model.state_dict()
    assert weights.keys() == state.keys() - {"lm_head.weight"}
    for name, held in weights.items():  # two pieces of rows, one file after the other
        assert torch.equal(held, state[name].flatten()), name


def test_a_rank_that_dies_within_a_save_is_not_called_a_save_that_failed(root: Path) -> None:
    assert re.fullmatch(r"RuntimeError: True, \w+ over all ranks", (root / "lost.txt").read_text())
