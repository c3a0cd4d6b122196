"""A model that no library knows, under a policy of its own: nothing in the passes depends on names or on transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import shardcomp
from shardcomp.cost.communication import messages
from shardcomp.policy.options import Options
from shardcomp.verification.verifier import verify

POLICY = """
family = "toy"
[weights]
"table"            = "vocab"
"stack.*.widen"    = "colwise"
"stack.*.{a,b}"    = "colwise"
"stack.*.narrow"   = "rowwise"
"stack.*.c"        = "rowwise"
"out"              = "vocab"
[units]
"table"   = "first"
"stack.*" = "layer"
"out"     = "last"
"""


class Block(nn.Module):
    """Two gated branches beside each other, each with biases, and a scale that is used in both."""

    def __init__(self, width: int, attend: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.widen, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.a, self.b, self.c = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        h = functional.layer_norm(x, x.shape[-1:]) * self.scale
        left = self.narrow(functional.gelu(self.widen(h)))
        if self.attend:
            q, k = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.a(h), self.b(h)))
            mixed = torch.cummax(q * k, -1).values
            right = self.c(mixed.transpose(1, 2).flatten(2))
        else:
            right = self.c(torch.sigmoid(self.a(h)) * self.b(h))
        return left + right + x * self.scale.mean()


class Toy(nn.Module):
    def __init__(self, depth: int = 2, width: int = 16, attend: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(31, width)
        self.stack = nn.ModuleList(Block(width, attend) for _ in range(depth))
        self.out = nn.Linear(width, 31)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.table(input_ids)
        for block in self.stack:
            x = block(x)
        logits = self.out(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def policy(tmp_path: Path, **options: object) -> shardcomp.Policy:
    path = tmp_path / "toy.toml"
    path.write_text(POLICY)
    return shardcomp.Policy.load(path, precision="fp64", **options)


@pytest.mark.parametrize("attend", [True, False])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_it_agrees_with_the_dense_model(tmp_path: Path, sequence_parallel: bool, attend: bool) -> None:
    torch.manual_seed(0)
    plan = policy(tmp_path, tensor=2, sequence_parallel=sequence_parallel)
    found = verify(Toy(attend=attend).double(), plan, 4, kinds=("causal",))
    assert found.ok, found


@pytest.mark.long  # verification/test_verifier.py plants them in a LLaMA
def test_every_planted_fault_is_noticed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = verify(Toy().double(), policy(tmp_path, tensor=2), 4, kinds=("causal",), mutate=True)
    assert found.mutants["survivors"] == [] and found.mutants["total"] >= 15


def test_two_branches_beside_each_other_pay_one_reduction(tmp_path: Path) -> None:
    lowered = shardcomp.lower(Toy(), policy(tmp_path, tensor=2, sequence_parallel=False), 2, seq=8)
    every = messages(lowered.program, Options(precision="fp64"), 1, 8, 1, lowered.mesh.coordinates(0))
    sent = [m for m in every if m.where == "stack.0"]
    forward = [m for m in sent if m.phase == "forward"]
    assert [(m.op, m.count) for m in forward] == [("all_reduce", 1)]  # the branches' biases are added behind it


def test_an_operator_without_a_rule_runs_whole_and_is_listed(tmp_path: Path) -> None:
    lowered = shardcomp.lower(Toy(attend=True), policy(tmp_path, tensor=2), 2, seq=8)
    listed = [entry.what for entry in lowered.program.degraded if "cummax" in entry.what]
    assert len(listed) == 1 and listed[0].startswith("stack.0")


def test_alike_blocks_share_a_body_and_others_do_not(tmp_path: Path) -> None:
    model = Toy(depth=4)
    model.stack[2].scale.requires_grad_(False)
    program = shardcomp.lower(model, policy(tmp_path, tensor=2), 2, seq=8).program
    bodies = [unit.body for unit in program.units if unit.kind == "layer"]
    assert bodies[0] is bodies[1] is bodies[3]
    assert bodies[2] is not bodies[0]
