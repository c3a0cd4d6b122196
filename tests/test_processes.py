"""The same over real processes: gloo under torchrun, against the dense model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from models import tiny

from shardcomp import presets
from shardcomp.reference import batches, dense
from shardcomp.runtime.initialisation import initialize

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from models import tiny
import shardcomp
from shardcomp import presets
from shardcomp.reference import batches

policy = shardcomp.Policy.load("llama", tensor=2, precision="fp64", micro_batch=1, seed=4)
sharded = shardcomp.shard(presets.build(tiny(tie_word_embeddings=True)), policy)
rank, size = sharded.mesh.get_local_rank("dp"), sharded.mesh["dp"].size()
batch = {name: held.chunk(size)[rank] for name, held in batches(97, 4, 16, 0)["causal"].items()}
step = sharded.train_step(**batch)
gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
norm = sharded.clip_grad_norm_(1e9)
sharded.save_pretrained(sys.argv[1] + "/saved")
if dist.get_rank() == 0:
    torch.save({"loss": step.loss, "norm": norm, "gradients": gradients}, sys.argv[1] + "/result.pt")
dist.destroy_process_group()
"""


def test_four_processes_agree_with_the_dense_model_and_save_it_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*launch, str(tmp_path / "train.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
