"""What is in a checkpoint, and what is refused before anything is changed or written."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from checkpoint.legs import LENGTH, adamw, lowered_for, same, train
from safetensors import safe_open
from torch import nn

import shardcomp
from shardcomp import CheckpointError, checkpoint, presets
from shardcomp.checkpoint import directory
from shardcomp.materialize import allocate, weights_of
from shardcomp.runtime.model import ShardedModel
from shardcomp.verification.thread_ranks import run_ranks
from shardcomp.weights.initialization import initialize
from support.models import tiny

PLAN: dict[str, Any] = {"tensor": 2, "data": 2, "zero": 3}
TIED = lowered_for(tiny(tie_word_embeddings=True), **PLAN)
TOKENS = torch.arange(2 * LENGTH).view(2, LENGTH)


def on_ranks(lowered: Any, call: Callable[[ShardedModel], Any]) -> list[Any]:
    return run_ranks(lowered.mesh.world_size, lambda rank: call(allocate(lowered, weights_of(lowered))))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "shardcomp": adamw,
    "adamw": lambda m: adamw(m, torch.optim.AdamW),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(1e-3), amsgrad=True, foreach=False),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-3),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.long  # contract/test_optimizers.py trains with each
def test_every_optimizer_of_torch_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    train(TIED, 2, save=tmp_path / "step-2", optimizer=OPTIMIZERS[name])
    whole = train(TIED, 4, optimizer=OPTIMIZERS[name])
    same(train(TIED, 4, load=tmp_path, optimizer=OPTIMIZERS[name]), whole)


def test_a_schedule_whose_state_has_numbers_for_keys_goes_on(tmp_path: Path) -> None:
    def rates(sharded: ShardedModel, load: bool) -> list[float]:
        optimizer = adamw(sharded)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.5)
        if load:
            checkpoint.load(tmp_path, sharded, optimizer, scheduler=scheduler)
        found = []
        for step in range(scheduler.last_epoch, 5):
            if step == 1 and not load:
                checkpoint.save(tmp_path / "step-1", sharded, optimizer, step=1, scheduler=scheduler)
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    whole = on_ranks(TIED, lambda sharded: rates(sharded, False))
    assert whole[0] == [3e-3, 3e-3, 1.5e-3, 1.5e-3, 0.75e-3]
    assert on_ranks(TIED, lambda sharded: rates(sharded, True)) == [each[1:] for each in whole]


def test_each_tensor_is_saved_once_and_nothing_is_pickled(tmp_path: Path) -> None:
    train(TIED, 1, save=tmp_path / "step-1")
    path = tmp_path / "step-1"
    manifest = json.loads((path / directory.MANIFEST).read_text())
    names = [n for n in manifest["tensors"] if n.startswith("model/")]
    assert "model/lm_head.weight" not in names and "model/model.embed_tokens.weight" in names
    stored = 0
    for file in path.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            stored += sum(opened.get_tensor(key).numel() for key in opened.keys() if key.startswith("model/"))  # noqa: SIM118
    assert stored == sum(math.prod(manifest["tensors"][name]["shape"]) for name in names)
    kinds = {each.suffix for each in path.iterdir()}
    assert kinds == {".json", ".safetensors", ""}, kinds


def test_generators_of_every_kind_go_on(tmp_path: Path) -> None:
    lowered = lowered_for(tiny())

    def draw(sharded: ShardedModel) -> list[Any]:
        return [
            random.gauss(0, 1),
            numpy.random.rand(),  # noqa: NPY002
            torch.rand(3).tolist(),
            torch.rand(3, generator=sharded.random.own.generator).tolist(),
            torch.rand(3, generator=sharded.random.shared.generator).tolist(),
        ]

    def save(sharded: ShardedModel) -> list[Any]:
        random.gauss(0, 1)  # leaves a second number behind
        draw(sharded)
        checkpoint.save(tmp_path / "step-1", sharded, step=1)
        return draw(sharded)

    def load(sharded: ShardedModel) -> list[Any]:
        draw(sharded)
        found = checkpoint.load(tmp_path, sharded)
        assert found.random and found.step == 1
        return draw(sharded)

    assert on_ranks(lowered, save) == on_ranks(lowered, load)


def test_what_was_said_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    extra = {"position": 2**40, "best": 0.1 + 0.2, "worst": math.inf, "names": ["ä", None, True]}
    extra |= {"pair": (1, "2"), "milestones": Counter({30: 1}), "by number": {1: 2, "1": 3}, "odd": {"__tuple__": []}}
    on_ranks(TIED, lambda sharded: checkpoint.save(tmp_path / "mine", sharded, step=7, extra=extra))
    [found, *_] = on_ranks(TIED, lambda sharded: checkpoint.load(tmp_path / "mine", sharded))
    assert found.extra == extra and found.step == 7 and found.path == tmp_path / "mine"
    assert found.policy["options"]["zero"] == 3 and found.versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny(tie_word_embeddings=False), "1 tensors are missing in it: lm_head.weight"),
        (tiny(tie_word_embeddings=True, vocab_size=98), "model.embed_tokens.weight is 97×32 in it and 98×32 in the model"),
        (tiny(tie_word_embeddings=True, num_hidden_layers=1), "9 tensors are not in the model"),
    ],
)
def test_another_model_is_refused_with_everything_that_differs(config: Any, said: str, tmp_path: Path) -> None:
    train(TIED, 1, save=tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=said):
        on_ranks(lowered_for(config), lambda sharded: checkpoint.load(tmp_path, sharded))


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=1), "states of AdamW, not of SGD"),
        (lambda m: torch.optim.AdamW(m.parameters()), "are in group 0 of the optimizer, and in two groups in it"),
    ],
)
def test_another_optimizer_is_refused(optimizer: Any, said: str, tmp_path: Path) -> None:
    train(TIED, 1, save=tmp_path / "step-1")
    with pytest.raises(CheckpointError, match=said):
        on_ranks(TIED, lambda sharded: checkpoint.load(tmp_path, sharded, optimizer(sharded)))


def test_states_that_lie_in_no_known_way_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def attempt(sharded: ShardedModel) -> None:
        optimizer = adamw(sharded)
        [first, *_] = optimizer.param_groups[0]["params"]
        optimizer.state[first]["row"] = torch.zeros(3)
        checkpoint.save(tmp_path / "step-1", sharded, optimizer, step=1)

    with pytest.raises(CheckpointError, match=r"its state row of .* is \(3,\)"):
        on_ranks(TIED, attempt)
    with pytest.raises(CheckpointError, match="extra cannot be saved: object is not a plain value"):
        on_ranks(TIED, lambda sharded: checkpoint.save(tmp_path / "step-1", sharded, step=1, extra={"a": object()}))
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="holds something else than a checkpoint"):
        on_ranks(TIED, lambda sharded: checkpoint.save(tmp_path, sharded, step=1))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_frozen_parameters_and_those_that_never_had_a_gradient(tmp_path: Path) -> None:
    model = initialize(presets.build(tiny(tie_word_embeddings=True)), 0)
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name)
    frozen = shardcomp.lower(model, shardcomp.Policy.load("llama", **PLAN, precision="fp64", micro_batch=2), seq=LENGTH)
    train(frozen, 2, save=tmp_path / "step-2")
    same(train(frozen, 3, load=tmp_path), train(frozen, 3))
    with pytest.raises(CheckpointError, match="did not have 14 of the parameters"):
        train(TIED, 3, load=tmp_path, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2))

    def fresh(sharded: ShardedModel) -> None:
        optimizer = adamw(sharded)  # before its first step it has no states
        checkpoint.save(tmp_path / "fresh", sharded, optimizer, step=0)
        checkpoint.load(tmp_path / "fresh", sharded, optimizer)
        assert not any(optimizer.state.values())

    on_ranks(TIED, fresh)


def test_the_loss_scale_and_the_count_of_skipped_steps_go_on(tmp_path: Path) -> None:
    lowered = lowered_for(tiny(), precision="fp16", data=2, zero=2)

    def save(sharded: ShardedModel) -> None:
        sharded.loss_scale.scale, sharded.loss_scale.good_steps, sharded.skipped_steps = 2.0**7, 5, 3
        checkpoint.save(tmp_path / "step-1", sharded, step=1)

    def load(sharded: ShardedModel) -> tuple[float, int, int]:
        checkpoint.load(tmp_path, sharded)
        return sharded.loss_scale.scale, sharded.loss_scale.good_steps, sharded.skipped_steps

    on_ranks(lowered, save)
    assert on_ranks(lowered, load) == [(2.0**7, 5, 3)] * 2
