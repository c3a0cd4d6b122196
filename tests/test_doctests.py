"""The examples in the docstrings of the public surface run, and print what they say."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardcomp
from shardcomp import checkpoint, presets
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.thread_ranks import run_ranks
from support.models import tiny

PUBLIC: dict[str, Any] = {
    "AdamW": shardcomp.AdamW,
    "AdamW.step": shardcomp.AdamW.step,
    "checkpoint.Saver": checkpoint.Saver,
    "checkpoint.checkpoints": checkpoint.checkpoints,
    "checkpoint.latest": checkpoint.latest,
    "checkpoint.load": checkpoint.load,
    "checkpoint.save": checkpoint.save,
    "checkpoint.verify": checkpoint.verify,
    "initialize": shardcomp.initialize,
    "shard": shardcomp.shard,
    "token_log_probs": shardcomp.token_log_probs,
    "ShardedModel": ShardedModel,
    **{
        f"ShardedModel.{name}": getattr(ShardedModel, name)
        for name in (
            "clip_grad_norm_",
            "eval_step",
            "forward",
            "grad_norm",
            "held_bytes",
            "named_parameters",
            "optimizer_step",
            "save_pretrained",
            "state_dict",
            "train",
            "train_step",
        )
    },
}


def examples(name: str, names: dict[str, Any]) -> Iterator[doctest.DocTest]:
    text = PUBLIC[name].__doc__ or ""
    yield doctest.DocTestParser().get_doctest(text, names, name, None, None)


def test_every_example_runs(tmp_path: Path) -> None:
    """All on one rank, of one model: what an example leaves behind, the next one finds."""
    failures: list[str] = []
    counts: dict[str, int] = {}

    def work(rank: int) -> None:
        model = shardcomp.initialize(presets.build(tiny()), seed=0)
        sharded = shardcomp.shard(model, "llama")
        names = {
            "shardcomp": shardcomp,
            "model": model,
            "sharded": sharded,
            "optimizer": shardcomp.AdamW(sharded.parameters()),
            "ids": torch.arange(16).view(2, 8),
            "folder": tmp_path,
        }
        for name in PUBLIC:
            sharded.zero_grad()
            runner = doctest.DocTestRunner(verbose=False)
            for test in examples(name, dict(names)):
                runner.run(test, out=failures.append)
                counts[name] = len(test.examples)

    run_ranks(1, work)
    assert not failures, "".join(failures)
    assert all(counts.values()), [name for name, count in counts.items() if not count]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_docstring_begins_with_one_sentence(name: str) -> None:
    first, *_ = (PUBLIC[name].__doc__ or "").split("\n\n")
    assert first.rstrip().endswith((".", "?")), first
