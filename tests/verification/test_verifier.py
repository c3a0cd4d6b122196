"""Every topology against the dense model, gradients included; and every mutant noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import shardcomp
from shardcomp import VerifyError, capture, presets
from shardcomp.runtime import backward
from shardcomp.verification import sharded_model
from shardcomp.verification.compare import TOLERANCE
from shardcomp.verification.verifier import verify
from support.families import tiny_config
from support.models import tiny

pytestmark = pytest.mark.usefixtures("chunked_losses")

WHOLE = {"none": True}
SLOW = pytest.mark.long


def check(config: Any, **options: Any) -> None:
    world = options.pop("world")
    policy = shardcomp.Policy.load("llama", **options)
    found = verify(config, policy, world, shrink=WHOLE)
    assert found.ok, found
    compared = {"loss", "gradients", "logits"}
    compared |= {"fp64": {"norm", "weights"}, "fp32": {"norm"}, "bf16": set()}[options["precision"]]
    assert set(found.deviation) == compared


@pytest.mark.grid
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, True), (2, False), (4, True), (4, False)])
def test_every_topology_agrees_with_the_dense_model(tensor: int, sequence_parallel: bool, data: int, precision: str) -> None:
    config = tiny(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    check(config, tensor=tensor, sequence_parallel=sequence_parallel, precision=precision, world=tensor * data)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_float64_agrees_on_three_ranks(sequence_parallel: bool) -> None:
    config = tiny(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    check(config, tensor=3, sequence_parallel=sequence_parallel, precision="fp64", world=3)


@pytest.mark.grid
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"vocab_size": 101, "num_key_value_heads": 4},
        {"num_hidden_layers": 1, "pad_token_id": 3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
    ],
    ids=str,
)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_float64_agrees_for_variants_of_the_model(changes: dict[str, Any], sequence_parallel: bool) -> None:
    check(tiny(**changes), tensor=2, sequence_parallel=sequence_parallel, precision="fp64", world=4)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_bf16_is_no_further_from_float64_than_the_dense_model_in_bf16(sequence_parallel: bool) -> None:
    check(tiny(), tensor=2, sequence_parallel=sequence_parallel, precision="bf16", world=4)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_every_mutant_is_noticed_by_its_numbers(sequence_parallel: bool) -> None:
    policy = shardcomp.Policy.load("llama", tensor=2, sequence_parallel=sequence_parallel, precision="fp64")
    model = tiny(num_hidden_layers=1, attention_bias=True)
    found = verify(model, policy, 4, shrink=WHOLE, mutate=True, kinds=("causal",))
    assert found.mutants["survivors"] == []
    assert found.mutants["killed"] == found.mutants["total"] >= 15
    assert found.ok


@pytest.mark.parametrize(
    ("options", "least"),
    [
        pytest.param({"pipeline": 2, "data": 2, "tensor": 2, "zero": 3}, 30, marks=SLOW),
        pytest.param({"pipeline": 2, "data": 2, "schedule": "zbv", "zero": 1}, 15, marks=SLOW),
        ({"pipeline": 2, "data": 2, "schedule": "zero_bubble", "zero": 2}, 9),
        pytest.param({"pipeline": 2, "data": 2}, 9, marks=SLOW),
        ({"data": 4, "zero": 3, "replicate": 2}, 7),
    ],
)
def test_faults_between_stages_and_data_parallel_ranks_are_noticed(options: dict[str, Any], least: int) -> None:
    config = tiny(num_hidden_layers=4, tie_word_embeddings=True)
    policy = shardcomp.Policy.load("llama", precision="fp64", **options)
    found = verify(config, policy, shrink=WHOLE, mutate=True, kinds=("causal",))
    assert found.mutants["survivors"] == []
    assert found.mutants["total"] >= least and found.ok


def test_a_split_backward_needs_no_weight_that_was_put_back_in_pieces() -> None:
    options = {"pipeline": 2, "data": 2, "schedule": "zero_bubble", "zero": 3}
    policy = shardcomp.Policy.load("gpt2", precision="fp64", **options)
    found = verify(tiny_config("gpt2"), policy, shrink=WHOLE, kinds=("causal",))  # with LayerNorm, whose own gradient reads it
    assert found.ok, found.worst


def test_a_call_with_a_mask_has_units_of_its_own_in_a_later_stage() -> None:
    policy = shardcomp.Policy.load("gpt2", precision="fp64", pipeline=2)
    found = verify(tiny_config("gpt2"), policy, shrink=WHOLE, kinds=("causal", "padded"))
    assert found.ok and found.batches == ("causal", "padded"), found.worst


class Failing(LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **given: Any) -> Any:
        if labels is not None:
            raise IndexError("no such expert")
        return super().forward(*args, **given)


def test_a_dense_model_that_fails_by_itself_is_told_with_its_line() -> None:
    with pytest.raises(
        VerifyError, match=r"does not train in fp64: .*test_verifier.py:\d+: raise IndexError.*: no such expert"
    ):
        verify(Failing(tiny()), shardcomp.Policy.load("llama", precision="fp64"), shrink=WHOLE)


@pytest.mark.long  # tied weights of several ranks are
def test_two_copies_of_a_tied_weight_on_one_rank_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    true = backward.reduce_partial

    def twice(partials: Any, device: torch.device) -> None:
        true(partials, device)
        for copies in (partial.copies for partial in partials if len(partial.copies) > 1):
            copies[1].grad.mul_(2)

    policy = shardcomp.Policy.load("llama", precision="fp64", pipeline=2, schedule="zbv")
    config = tiny(num_hidden_layers=4, tie_word_embeddings=True)
    assert verify(config, policy, shrink=WHOLE, kinds=("causal",)).ok
    monkeypatch.setattr(backward, "reduce_partial", twice)
    answer = verify(config, policy, shrink=WHOLE, kinds=("causal",))
    assert not answer.ok and answer.worst["value"] > answer.worst["tolerance"]
    tied = [item for item in answer.disagreements if item["parameter"] == "model.embed_tokens.weight"]
    assert tied and tied[0]["batch"] == "causal"
    stages = [(copy["ranks"], copy["stage"], copy["deviation"] < 1e-9) for copy in tied[0]["copies"]]
    assert len(stages) == 2 and {correct for _, _, correct in stages} == {True, False}
    assert stages[0][0] == stages[1][0] and stages[0][1] != stages[1][1]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_ranks_that_disagree_are_reported_beside_the_deviations(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Norms see a part of the sequence on each rank. Without a reduction, their gradients differ from rank to rank."""
    monkeypatch.setattr(backward, "reduce_partial", lambda partials, device: None)
    policy = shardcomp.Policy.load("llama", tensor=2, precision=precision)
    answer = verify(tiny(), policy, 2, shrink=WHOLE, kinds=("causal",))
    assert not answer.ok
    assert {"loss", "gradients", "logits"} <= answer.deviation.keys()
    norms = {name for name, _ in presets.build(tiny()).named_parameters() if "norm" in name}
    assert {item["parameter"] for item in answer.disagreements if item["batch"] == "causal"} == norms
    worst = answer.disagreements[0]
    assert worst["quantity"] == "gradients" and worst["apart"] > 0.1
    assert [copy["ranks"] for copy in worst["copies"]] == [[0], [1]]
    assert all(copy["deviation"] > 0.1 for copy in worst["copies"])
    if precision == "fp64":  # 16 bits have no tolerance for one parameter
        assert answer.worst["quantity"] == "gradients" and answer.worst["parameter"] in norms


def test_ranks_that_all_have_nan_do_not_disagree() -> None:
    ranks = [sharded_model._RankOutcome(loss={"causal": torch.tensor(value)}) for value in (float("nan"), float("nan"), 1.0)]
    assert not sharded_model._assemble_ranks(ranks[:2], {}).disagreements
    [differing] = sharded_model._assemble_ranks(ranks, {}).disagreements
    assert [copy.ranks for copy in differing.copies] == [[0, 1], [2]]


@pytest.mark.long  # contract/test_batches.py has padding on the left
def test_a_position_that_sees_nothing_does_not_count() -> None:
    policy = shardcomp.Policy.load("gemma2", precision="fp64", data=4)  # rows with more padding than the window is wide
    found = verify(tiny_config("gemma2"), policy, shrink=WHOLE, kinds=("causal", "padded"))
    assert found.ok, found.worst


def test_a_frozen_stage_agrees_with_the_dense_model() -> None:
    model = shardcomp.initialize(presets.build(tiny(num_hidden_layers=4)), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.embed_tokens", *(f"model.layers.{i}." for i in range(3)))))
    policy = shardcomp.Policy.load("llama", precision="fp64", pipeline=2, data=2, zero=3)
    found = verify(model, policy, kinds=("causal",))
    assert found.ok, found.worst


def test_a_wrong_answer_is_reported_with_where_and_how_to_reproduce_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCE, "fp64", 1e-30)
    found = verify(tiny(), shardcomp.Policy.load("llama", tensor=2, precision="fp64"), 2, shrink=WHOLE, kinds=("causal",))
    assert not found.ok
    assert found.worst["value"] > found.worst["tolerance"] == 1e-30
    assert "--tensor 2" in found.reproduce


def test_a_model_with_real_weights_is_verified_as_it_is() -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(tiny())
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = verify(model, shardcomp.Policy.load("llama", tensor=2, precision="fp64"), 2, kinds=("causal",))
    assert found.ok, found
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.long  # so is a model that drops
def test_a_configuration_with_dropout_is_verified_without_and_the_answer_says_so(tmp_path: Path) -> None:
    from transformers import GPT2Config

    units = '[units]\n"transformer.wte" = "first"\n"transformer.h.*" = "layer"\n"transformer.ln_f" = "last"\n'
    (tmp_path / "own.toml").write_text(f'family = "gpt2"\n[weights]\n"transformer.wte" = "vocab"\n{units}')
    policy = shardcomp.Policy.load(tmp_path / "own.toml", tensor=2, precision="fp64")
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=300)
    found = verify(config, policy, 2, kinds=("causal",))
    assert found.ok, found
    assert {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}.items() <= found.dropout.items()
    assert config.attn_pdrop == 0.1
    found = verify(tiny(attention_dropout=0.2), shardcomp.Policy.load("llama", tensor=2, precision="fp64"), 2, shrink=WHOLE)
    assert found.ok and found.dropout == {"attention_dropout": 0.2}


class Dropped(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x), getattr(self, "some_drop", 0.1))


def test_a_model_that_drops_is_verified_without_and_refused_where_that_cannot_be() -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny())
    projections = [layer.mlp.up_proj for layer in model.model.layers]
    for each in projections:
        each.__class__, each.some_drop = Dropped, 0.3
    policy = shardcomp.Policy.load("llama", tensor=2, precision="fp64")
    found = verify(model, policy, 2, kinds=("causal",))
    assert found.ok, found
    assert found.dropout == {f"model.layers.{i}.mlp.up_proj.some_drop": 0.3 for i in range(2)}
    assert all(each.some_drop == 0.3 for each in projections)
    for each in projections:
        del each.some_drop
    with pytest.raises(VerifyError, match=r"model.layers.0.mlp.up_proj drops, .* has 'drop' in its name"):
        verify(model, policy, 2, kinds=("causal",))


@pytest.mark.captures_anew
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_model_with_static_shapes_only_is_lowered_for_each_shape_and_says_so(
    monkeypatch: pytest.MonkeyPatch, sequence_parallel: bool
) -> None:
    true = capture.export

    def static(module: Any, mode: Any, signature: Any, sample: Any, dynamic: bool, *rest: Any) -> Any:
        if dynamic:
            raise RuntimeError("a size of this model is a constant")
        return true(module, mode, signature, sample, dynamic, *rest)

    monkeypatch.setattr(capture, "export", static)
    policy = shardcomp.Policy.load("llama", tensor=2, sequence_parallel=sequence_parallel, precision="fp64")
    lowered = shardcomp.lower(tiny(), policy, seq=16, sample=(2, 16))
    assert lowered.program.static_shape == (2, 16)
    assert "(2, 16) alone" in lowered.program.degraded[0].why
    found = verify(tiny(), policy, 4, shrink=WHOLE)
    assert found.ok, found


def test_it_compares_the_gradients_of_a_loss_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that starts from outputs, and is not known as one of the model, leaves gradients that are not reduced."""
    from shardcomp.runtime import direct_call

    monkeypatch.setattr(direct_call, "around_backward", lambda outputs, begin, end: outputs)
    found = shardcomp.verify(presets.build(tiny()), shardcomp.Policy.load("llama", tensor=2, precision="fp64"), 4)
    assert not found.ok and found.worst["quantity"] == "gradients" and found.deviation["norm"] < 1e-9
