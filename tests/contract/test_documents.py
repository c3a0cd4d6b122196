"""The tables of the documents name tests that exist, and the examples of the pages run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from contract.plans import make_batch, model

import shardcomp
from shardcomp.verification.thread_ranks import run_alone

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "docs/module_contract.md"


def named_tests() -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", CONTRACT.read_text())


def test_every_row_of_the_module_contract_names_a_test() -> None:
    tested, _, _ = CONTRACT.read_text().partition("## What torch does not let us see")
    rows = [line for line in tested.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    without = [row for row in rows if "::test_" not in row and "| test |" not in row]
    assert not without
    assert len(rows) > 40


@pytest.mark.parametrize(("file", "name"), sorted(set(named_tests())))
def test_a_test_that_the_module_contract_names_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


def test_the_preference_loss_of_the_page_runs_as_it_stands() -> None:
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loss.md").read_text(), re.DOTALL)
        if "def " in block
    )
    namespace = {"torch": torch, "shardcomp": shardcomp}
    exec(code, namespace)

    def work(rank: int) -> None:
        policy = shardcomp.Policy.load("llama", precision="fp32")
        trained, reference = (shardcomp.shard(dense, policy) for dense in (model(), model().eval()))
        chosen, rejected = make_batch(seed=1)["input_ids"], make_batch(seed=2)["input_ids"]
        loss = namespace["preference_loss"](trained, reference, chosen, rejected)  # type: ignore[operator]
        torch.testing.assert_close(loss.detach(), 4 * torch.log(torch.tensor(2.0)))  # both models are the same
        loss.backward()
        assert all(p.grad is not None for p in trained.parameters())

    run_alone(1, work)
