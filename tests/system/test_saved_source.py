"""The listing is the code that runs: saved source trains without the compiler, and editing it changes the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shardcomp
from shardcomp import PlanError
from shardcomp.runtime.blueprint import Blueprint
from support.models import tiny

SCRIPT = """
import sys, torch
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.runtime import Blueprint, build

blueprint = Blueprint.load(sys.argv[1])

def weights(name, index):
    shape = blueprint.parameters[name].shape
    draw = torch.Generator().manual_seed(len(name))
    return (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * 0.1)[index]

def work(rank):
    model = build(blueprint, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    ids = torch.arange(64).reshape(4, 16) % 31
    losses = []
    for _ in range(4):
        losses.append(float(model.train_step(input_ids=ids, labels=ids).loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses

losses = run_ranks(2, work)[0]
assert losses[-1] < losses[0], losses
compiler = [f"shardcomp.{n}" for n in ("capture", "policy", "lowering", "driver", "propagate", "passes", "inspect", "verifier")]
assert not [name for name in sys.modules if name.startswith(tuple(compiler))]
assert "transformers" not in sys.modules
print(*losses)
"""


def run(folder: Path) -> list[float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_saved_source_trains_without_the_compiler_and_an_edit_changes_the_result(tmp_path: Path) -> None:
    policy = shardcomp.Policy.load("llama", tensor=2, precision="fp32")
    shardcomp.lower(tiny(), policy, 2, seq=16).save_source(tmp_path)
    losses = run(tmp_path)
    assert run(tmp_path) == losses
    source = (tmp_path / "model.py").read_text()
    assert source.count("swiglu(gate_proj, up_proj") == 1
    (tmp_path / "model.py").write_text(source.replace("swiglu(gate_proj, up_proj", "swiglu(up_proj, gate_proj"))
    assert run(tmp_path) != losses


@pytest.mark.long  # the test above trains saved source
def test_saved_source_drops_the_same_at_every_run(tmp_path: Path) -> None:
    policy = shardcomp.Policy.load("llama", tensor=2, precision="fp32", seed=3)
    shardcomp.lower(tiny(attention_dropout=0.1), policy, 2, seq=16).save_source(tmp_path)
    assert (tmp_path / "model.py").read_text().count("dropout=0.1, random=self.random.own") == 1
    losses = run(tmp_path)
    assert run(tmp_path) == losses
    plan = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(plan.replace('"seed": 3', '"seed": 4'))
    assert run(tmp_path) != losses


def test_a_blueprint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    blueprint = shardcomp.lower(tiny(), shardcomp.Policy.load("llama", tensor=2), 4, seq=16).blueprint()
    blueprint.save(tmp_path)
    again = Blueprint.load(tmp_path)
    for name in blueprint.__dataclass_fields__:
        if name != "buffers":
            assert getattr(again, name) == getattr(blueprint, name), name
    assert again.buffers.keys() == blueprint.buffers.keys()


def test_a_directory_without_saved_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="plan.json"):
        Blueprint.load(tmp_path)
