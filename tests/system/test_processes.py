"""The same over real processes, against the dense model: gloo, with torchrun where there are many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from system import test_plans

import shardcomp
from shardcomp import presets
from shardcomp.verification.dense_model import batches, dense
from shardcomp.weights.initialization import initialize
from support.models import tiny
from support.processes import run_processes
from support.selection import LONG


def train_and_save(rank: int, folder: Path) -> None:
    """What one of four ranks runs: two halves of a batch, under tensor = 2."""
    policy = shardcomp.Policy.load("llama", tensor=2, precision="fp64", micro_batch=1, seed=4)
    sharded = shardcomp.shard(presets.build(tiny(tie_word_embeddings=True)), policy)
    place, size = sharded.mesh.get_local_rank("dp"), sharded.mesh["dp"].size()
    batch = {name: tokens.chunk(size)[place] for name, tokens in batches(97, 4, 16, 0)["causal"].items()}
    step = sharded.train_step(**batch)
    gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    norm = sharded.clip_grad_norm_(1e9)
    sharded.save_pretrained(folder / "saved")
    if rank == 0:
        torch.save({"loss": step.loss, "norm": norm, "gradients": gradients}, folder / "result.pt")


PLANS = """
import json
import sys
import torch
import torch.distributed as dist
from system import test_plans
import shardcomp

folder, plans = sys.argv[1], json.loads(sys.argv[2])
for index, plan in enumerate(plans):
    sharded = shardcomp.shard(test_plans.model(plan["tied"]), test_plans.policy_of(plan))
    torch.save(test_plans.step(plan, sharded), f"{folder}/{index}-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def launch(folder: Path, script: str, processes: int, *arguments: str) -> None:
    (folder / "train.py").write_text(script)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        + [str(folder / "train.py"), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("processes", [pytest.param(n, marks=pytest.mark.long) for n in (2, 4, 6, 8)])
def test_plans_with_a_pipeline_agree_with_the_dense_model(processes: int, tmp_path: Path) -> None:
    plans = [plan for plan in test_plans.covering() if plan["pipeline"] > 1 and test_plans.ranks(plan) == processes]
    plans = plans if LONG else plans[:2]
    assert len(plans) > 1
    launch(tmp_path, PLANS, processes, json.dumps(plans))
    for index, plan in enumerate(plans):
        found = [torch.load(tmp_path / f"{index}-{rank}.pt", weights_only=True) for rank in range(processes)]
        test_plans.compare(plan, found)


def test_four_processes_agree_with_the_dense_model_and_save_it_together(tmp_path: Path) -> None:
    run_processes(train_and_save, 4, tmp_path)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    model = initialize(presets.build(tiny(tie_word_embeddings=True)), 4)
    batch = batches(97, 4, 16, 0)["causal"]
    expected = dense(model, "fp64", {"causal": batch}, [])
    torch.testing.assert_close(found["loss"], expected.loss["causal"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["norm"], expected.norm["causal"], rtol=1e-10, atol=0)
    assert found["gradients"].keys() == expected.gradients["causal"].keys()
    for name, gradient in expected.gradients["causal"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
