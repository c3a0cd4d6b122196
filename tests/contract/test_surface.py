"""The rest of what a plain module promises to training code: contexts, modes, state, conversions, copies, wrappers."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.plans import (
    FLAT,
    LOSS,
    PLANS,
    assert_gradients,
    double,
    exactly,
    gradients,
    lowered,
    make_batch,
    mine,
    model,
    run,
    usual,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, Trainer, TrainingArguments

import shardcomp
from shardcomp import presets
from shardcomp.lowering import Signature
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.model import ShardedModel

each_plan = pytest.mark.parametrize("plan", PLANS)
BATCH = make_batch()
EXPECTED = gradients(model(), lambda m: m(**BATCH).loss)


def dropping() -> nn.Module:
    """A model that drops a tenth in training."""
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return shardcomp.initialize(presets.build(config), 0).train()


def halved() -> nn.Module:
    """The usual model with other numbers."""
    other = model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    return other


@each_plan
def test_evaluation_may_come_first_and_under_inference_mode(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        with torch.inference_mode():
            first = sharded.eval_step(**part).loss
        step = sharded.train_step(**part)
        assert_gradients(sharded, EXPECTED)
        with torch.no_grad():
            assert torch.equal(sharded.eval_step(**part).loss, first) and torch.equal(step.loss, first)

    run(usual(plan), work)


@each_plan
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_training_step_without_gradients_is_refused(plan: str, context: Callable[[], Any]) -> None:
    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.PlanError, match="train_step under no_grad or inference_mode"), context():
            sharded.train_step(**mine(sharded, BATCH))

    run(usual(plan), work)


@each_plan
def test_autocast_is_refused_where_it_asks_for_another_dtype(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.PlanError, match="precision = bf16 in the policy"), torch.autocast("cpu", torch.bfloat16):
            sharded.train_step(**mine(sharded, BATCH))

    run(usual(plan), work)


@pytest.mark.parametrize("plan", ["one rank", "tensor 2"])
def test_autocast_to_the_plans_own_dtype_changes_no_bit(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        alone = sharded.train_step(**part).loss
        before = [full_tensor(p.grad).clone() for p in sharded.parameters()]
        sharded.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sharded.train_step(**part).loss, alone)
        assert all(torch.equal(full_tensor(p.grad), old) for p, old in zip(sharded.parameters(), before, strict=True))

    run(lowered(plan, model(), (LOSS,), precision="bf16"), work)


@each_plan
def test_detect_anomaly_is_refused_where_torch_cannot_look(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        refused = pytest.raises(shardcomp.PlanError, match=r"detect_anomaly\(check_nan=False\)")
        with refused, torch.autograd.set_detect_anomaly(True):
            sharded.train_step(**part)
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            sharded.train_step(**part)
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


@each_plan
def test_saved_tensors_may_be_kept_on_the_host(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        with torch.autograd.graph.save_on_cpu():
            sharded.train_step(**mine(sharded, BATCH))
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


@each_plan
def test_deterministic_algorithms_change_nothing(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        sharded.train_step(**mine(sharded, BATCH))
        assert_gradients(sharded, EXPECTED)

    torch.use_deterministic_algorithms(True)  # of the process, which the ranks share
    try:
        run(usual(plan), work)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plan", FLAT)
def test_gradients_of_gradients_are_refused(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        with pytest.raises(shardcomp.PlanError, match="create_graph = True"):
            sharded(**part).loss.backward(create_graph=True)
        sharded.train_step(**part)
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


@pytest.mark.parametrize("plan", FLAT)
def test_a_call_under_torchs_checkpoint_is_refused(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        ids = mine(sharded, BATCH)["input_ids"]
        found = torch.utils.checkpoint.checkpoint(lambda i: sharded(input_ids=i).logits.sum(), ids, use_reentrant=False)
        with pytest.raises(shardcomp.PlanError, match="recompute = full or selective"):
            found.backward()

    run(usual(plan), work)


@each_plan
def test_the_mode_of_the_model_is_kept(plan: str) -> None:
    dense = dropping().eval()
    low = lowered(plan, dense, (LOSS,))
    low.for_call((*LOSS[:2], False), (4, 8))
    twin = double(dense)
    with exactly(), torch.no_grad():
        expected = twin(**BATCH).loss

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        assert not sharded.training and not any(module.training for module in sharded.modules())
        for _ in range(2):
            torch.testing.assert_close(sharded.eval_step(**part).loss, expected, rtol=1e-9, atol=0)
        sharded.train()
        assert all(module.training for module in sharded.modules())
        losses = [sharded.eval_step(**part).loss for _ in range(2)]
        assert not torch.equal(*losses) and not any(torch.equal(loss, expected) for loss in losses)
        sharded.eval()
        torch.testing.assert_close(sharded.train_step(**part).loss, expected, rtol=1e-9, atol=0)

    run(low, work)


@each_plan
def test_modules_in_modes_of_their_own_stay_in_them(plan: str) -> None:
    """A model in training mode all of whose modules that drop are in evaluation."""
    dense = dropping()
    for module in (dense.transformer.drop, *dense.transformer.h):
        module.eval()
    policy = shardcomp.Policy.load("auto", precision="fp64", **PLANS[plan])
    low = shardcomp.lower(dense, policy, seq=8, signature=Signature(*LOSS[:2], None))
    twin = double(dense).eval()
    with exactly(), torch.no_grad():
        expected = twin(**BATCH).loss

    def work(sharded: ShardedModel) -> None:
        assert sharded.training
        torch.testing.assert_close(sharded.train_step(**mine(sharded, BATCH)).loss, expected, rtol=1e-9, atol=0)

    run(low, work)


@each_plan
def test_state_dicts_are_loaded_also_with_assign(plan: str) -> None:
    expected = gradients(halved(), lambda m: m(**BATCH).loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.0)
        sharded.train_step(**part)
        optimizer.zero_grad()
        state = {name: tensor.detach() * 0.5 for name, tensor in sharded.state_dict().items()}
        assert set(state) == {name for name, _ in sharded.named_parameters()}
        result = sharded.load_state_dict(state, assign=True)
        assert not result.missing_keys and not result.unexpected_keys
        sharded.train_step(**part)
        assert_gradients(sharded, expected)
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert held == {id(p) for p in sharded.parameters()}  # the optimizer goes on with the same parameters

    run(usual(plan), work)


@each_plan
def test_parameters_changed_in_place_are_used(plan: str) -> None:
    expected = gradients(halved(), lambda m: m(**BATCH).loss)

    def work(sharded: ShardedModel) -> None:
        part = mine(sharded, BATCH)
        sharded.train_step(**part)
        sharded.zero_grad(set_to_none=False)
        assert all(not bool(full_tensor(p.grad).any()) for p in sharded.parameters())
        with torch.no_grad():
            for p in sharded.parameters():
                p.mul_(0.5)
        sharded.train_step(**part)
        assert_gradients(sharded, expected)

    run(usual(plan), work)


@pytest.mark.parametrize("plan", FLAT)
def test_names_give_sharded_parameters_also_between_passes(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        known = dict(sharded.named_parameters())
        out = sharded(**mine(sharded, BATCH))
        assert sharded.lm_head.weight is known["lm_head.weight"]
        assert sharded.get_parameter("model.norm.weight") is known["model.norm.weight"]
        out.loss.backward()
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


def functional(sharded: ShardedModel) -> Any:
    return torch.func.functional_call(sharded, {n: p.detach() * 2 for n, p in sharded.named_parameters()}, (), BATCH)


def part(sharded: ShardedModel) -> Any:
    """A module inside, which every stage has."""
    return sharded.model.layers


def named(sharded: ShardedModel) -> Any:
    """A module that has a parameter of its own, on any stage."""
    return next(module for module in sharded.modules() if "weight" in module._parameters)


REFUSED: dict[str, tuple[Callable[[ShardedModel], Any], str]] = {
    "half": (lambda s: s.half(), "asked to be torch.float16"),
    "to another dtype": (lambda s: s.to(torch.bfloat16), "asked to be torch.bfloat16"),
    "to another device": (lambda s: s.to("meta"), "asked to be torch.* on meta"),
    "a part of it, to another dtype": (lambda s: part(s).half(), "a module inside a sharded model was converted"),
    "apply": (lambda s: s.apply(print), r"apply\(...\) on a sharded model"),
    "apply to a part": (lambda s: part(s).apply(print), r"apply\(...\) on a module inside"),
    "share_memory": (lambda s: s.share_memory(), "share_memory"),
    "to_empty": (lambda s: s.to_empty(device="cpu"), "to_empty"),
    "deepcopy": (copy.deepcopy, "a sharded model was copied"),
    "AveragedModel": (AveragedModel, "for an average of weights"),
    "pickle": (pickle.dumps, "a sharded model was pickled"),
    "torch.save": (lambda s: torch.save(s, io.BytesIO()), "a sharded model was pickled"),
    "a new module": (lambda s: setattr(s, "head", nn.Linear(2, 2)), "head was added to a sharded model"),
    "a new parameter": (lambda s: s.register_parameter("x", nn.Parameter(torch.ones(1))), "x was added"),
    "a new module in a part": (lambda s: part(s).add_module("y", nn.Linear(2, 2)), "y was added"),
    "another parameter": (lambda s: setattr(named(s), "weight", nn.Parameter(torch.ones(1))), "weight of a sharded model was"),
    "another module": (lambda s: setattr(s, "model", nn.Linear(2, 2)), "the module model of a sharded model was replaced"),
    "the mode of a part": (lambda s: part(s).eval(), "the mode of a module inside a sharded model"),
    "a call of a part": (lambda s: part(s)(BATCH["input_ids"]), "a module inside a sharded model was called"),
    "a forward hook of a part": (lambda s: part(s).register_forward_hook(print), "a hook was registered on a module inside"),
    "a forward pre-hook of a part": (lambda s: part(s).register_forward_pre_hook(print), "a hook was registered"),
    "a backward hook of a part": (lambda s: part(s).register_full_backward_hook(print), "a hook was registered"),
    "a backward pre-hook of a part": (lambda s: part(s).register_full_backward_pre_hook(print), "a hook was registered"),
    "DistributedDataParallel": (nn.parallel.DistributedDataParallel, "given to DistributedDataParallel"),
    "fully_shard": (torch.distributed.fsdp.fully_shard, "given to fully_shard or replicate"),
    "Trainer": (lambda s: s.accepts_loss_kwargs, "given to transformers' Trainer"),
}


@each_plan
def test_what_cannot_be_honoured_is_refused_with_what_would_do(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        for what, (call, message) in REFUSED.items():
            with pytest.raises(shardcomp.PlanError) as refused:
                call(sharded)
            assert re.search(message, str(refused.value)), f"{what}: {refused.value}"
        sharded.train_step(**mine(sharded, BATCH))  # and nothing has happened
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


def test_transformers_trainer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

    def work(sharded: ShardedModel) -> None:
        with pytest.raises(shardcomp.PlanError, match="given to transformers' Trainer"):
            Trainer(sharded, TrainingArguments(output_dir=str(tmp_path), report_to=[]))

    run(usual("one rank"), work)


@pytest.mark.parametrize("plan", FLAT)
def test_a_functional_call_is_refused(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        doubled = {name: p.detach() * 2 for name, p in sharded.named_parameters()}
        with pytest.raises(shardcomp.PlanError, match="was replaced by another tensor"):
            torch.func.functional_call(sharded, doubled, (), mine(sharded, BATCH))
        sharded.train_step(**mine(sharded, BATCH))
        assert_gradients(sharded, EXPECTED)

    run(usual(plan), work)


@each_plan
def test_methods_of_other_frameworks_name_what_does_it_here(plan: str) -> None:
    instead = {"generate": "save_pretrained", "gradient_checkpointing_enable": "recompute", "no_sync": "micro_batch"}

    def work(sharded: ShardedModel) -> None:
        for name, what in instead.items():
            assert not hasattr(sharded, name)
            with pytest.raises(AttributeError, match=what):
                getattr(sharded, name)

    run(usual(plan), work)


@each_plan
def test_conversions_to_what_is_are_allowed(plan: str) -> None:
    def work(sharded: ShardedModel) -> None:
        assert sharded.to("cpu") is sharded and sharded.to(torch.empty(0).device) is sharded and sharded.cpu() is sharded
        assert sharded.requires_grad_(True) is sharded

    run(usual(plan), work)


class Scaled(nn.Module):
    """A factor of no dimension, as of a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def with_scalars() -> nn.Module:
    found = model()
    found.model.norm.temperature = Scaled()
    found.model.layers[0].mlp.gain = Scaled()
    for module in (found.model.norm, found.model.layers[0].mlp):
        child = module.temperature if hasattr(module, "temperature") else module.gain
        module.register_forward_hook(lambda _, args, out, child=child: child(out))
    return found


@each_plan
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_parameters_of_no_dimension_train(plan: str, precision: str) -> None:
    expected = gradients(with_scalars(), lambda m: m(**BATCH).loss)
    low = lowered(plan, with_scalars(), precision=precision, micro_batch=1)
    low.for_call(LOSS, (1, 8))

    def work(sharded: ShardedModel) -> None:
        for _ in range(2):
            sharded.train_step(**mine(sharded, BATCH))
        twice = {name: 2 * gradient for name, gradient in expected.items()}
        assert_gradients(sharded, twice, 1e-9 if precision == "fp64" else 0.2)
        scales = [p for name, p in sharded.named_parameters() if name.endswith("scale")]
        assert all(p.shape == () and p.dtype == (torch.float64 if precision == "fp64" else torch.float32) for p in scales)
        norm = torch.stack([gradient.norm() for gradient in twice.values()]).norm()
        if precision == "fp64":
            torch.testing.assert_close(sharded.grad_norm(), norm, rtol=1e-9, atol=0)
        sharded.optimizer_step(shardcomp.AdamW(sharded.parameters()))

    run(low, work)


def test_an_error_of_torchs_says_what_failed_and_where() -> None:
    def work(sharded: ShardedModel) -> None:
        unit = sharded._calls.of(BATCH, ("loss",), True).stages[0].units[1]

        def fail(*args: Any) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        true, unit.call = unit.call, fail
        with pytest.raises(RuntimeError, match=r"shardcomp: train_step of input_ids \[4, 8\], .* failed on rank \d \(tp"):
            sharded.train_step(**BATCH)
        unit.call = true

    run(lowered("tensor 2", model(), (LOSS,)), work)
