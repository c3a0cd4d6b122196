"""Policies: reading files, matching patterns to modules, options and flags, meshes."""

from __future__ import annotations

import argparse
import itertools
import pickle
from pathlib import Path

import pytest

from shardcomp.errors import PolicyError
from shardcomp.ir.mesh import Mesh
from shardcomp.policy import Policy, patterns
from shardcomp.policy.options import Options, add_option_flags, flags, joined, options_from

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PARAMETERS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{module}.weight" for i in range(12) for module in (*LINEARS, "input_layernorm")),
    "model.norm.weight",
    "lm_head.weight",
]
MODULES = ["model", "model.embed_tokens", "model.layers", *(f"model.layers.{i}" for i in range(12)), "model.norm", "lm_head"]


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_the_shipped_policy_gives_every_weight_of_its_family_its_word() -> None:
    found = Policy.load("llama", tensor=2).weight_entries(PARAMETERS)
    words = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "gate_proj": "colwise", "up_proj": "colwise"}
    words |= {"o_proj": "rowwise", "down_proj": "rowwise", "embed_tokens": "vocab", "lm_head": "vocab"}
    expected = {name: words[leaf] for name in PARAMETERS if (leaf := name.split(".")[-2]) in words}
    assert found == expected


def test_parameters_of_modules_that_no_entry_names_are_absent() -> None:
    found = Policy.load("llama").weight_entries(PARAMETERS)
    assert "model.norm.weight" not in found and "model.layers.0.input_layernorm.weight" not in found


def test_a_bias_has_the_word_of_its_module() -> None:
    found = Policy.load("llama").weight_entries([*PARAMETERS, "model.layers.0.self_attn.q_proj.bias"])
    assert found["model.layers.0.self_attn.q_proj.bias"] == "colwise"


def test_a_tied_head_is_known_by_the_embeddings_name_alone() -> None:
    tied = [name for name in PARAMETERS if name != "lm_head.weight"]
    found = Policy.load("llama").weight_entries(tied, {"lm_head.weight": "model.embed_tokens.weight"})
    assert found["model.embed_tokens.weight"] == "vocab" and "lm_head.weight" not in found


def test_a_word_that_only_an_alias_has_counts_for_the_parameter(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path, 'family = "f"\n[weights]\n"head" = "vocab"\n'))
    assert policy.weight_entries(["embed.weight"], {"head.weight": "embed.weight"}) == {"embed.weight": "vocab"}


def test_units_come_in_the_order_of_the_modules() -> None:
    found = Policy.load("llama").unit_kinds(MODULES)
    assert list(found) == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(12)), "lm_head"]
    assert set(list(found.values())[1:-1]) == {"layer"} and found["lm_head"] == "last"


def test_a_model_that_fits_passes_the_check_whatever_its_type() -> None:
    Policy.load("llama").check(PARAMETERS, MODULES, model_type="mistral")


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a.*.b", "a.0.b", True),
        ("a.*.b", "a.0.1.b", False),
        ("a.*.b", "xa.0.b", False),
        ("a.*", "a.0.b", False),
        ("a.{q,k}_proj", "a.k_proj", True),
        ("a.{q, k}_proj", "a.k_proj", True),
        ("a.{q,k}_proj", "a.kq_proj", False),
        ("a.{q,k}_{x,y}", "a.q_y", True),
        ("a_b", "aXb", False),
    ],
)
def test_a_star_is_one_segment_and_braces_are_alternatives(pattern: str, path: str, matches: bool) -> None:
    assert patterns.parse(pattern).matches(path) is matches


def test_of_the_names_of_one_module_in_different_releases_one_must_match() -> None:
    pattern = patterns.parse("{lm_head|embed_out}")
    assert pattern.violations(["embed_out"]) == pattern.violations(["lm_head"]) == []
    assert pattern.violations(["zzz"]) == ["matches no module"]
    assert patterns.parse("{mlp|ffn}.{up,down}").violations(["ffn.up"]) == ["alternative 'down' matches no module"]
    with pytest.raises(ValueError, match="neither a name"):
        patterns.parse("{a,b|c}")


def test_a_combination_of_alternatives_may_be_missing_if_each_alternative_is_used() -> None:
    assert patterns.parse("{attn,mlp}.{q,up}").violations(["attn.q", "mlp.up"]) == []


def test_keyword_arguments_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, 'family = "f"\n[weights]\n"a" = "colwise"\n[options]\ntensor = 4\nprecision = "fp32"\n')
    options = Policy.load(path, tensor=2).options
    assert (options.tensor, options.precision, options.seed) == (2, "fp32", 0)


@pytest.mark.parametrize("tensor", [1, 2])
def test_sequence_parallelism_follows_tensor_parallelism_unless_it_is_asked_for(tensor: int) -> None:
    assert Options(tensor=tensor).sequence_parallel is (tensor > 1)
    assert Options(tensor=tensor, sequence_parallel=False).sequence_parallel is False


def test_a_default_is_taken_anew_when_other_options_are_replaced(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path, 'family = "f"\n[weights]\n"a" = "colwise"\n'))
    assert policy.options.sequence_parallel is False
    assert policy.replace(tensor=2).options.sequence_parallel is True
    assert policy.replace(tensor=2, sequence_parallel=False).replace(tensor=4).options.sequence_parallel is False


def test_replace_leaves_the_policy_itself_as_it_was() -> None:
    policy = Policy.load("llama", tensor=2)
    assert policy.replace(tensor=4).options.tensor == 4 and policy.options.tensor == 2


def test_data_parallelism_takes_the_ranks_that_are_left() -> None:
    assert Policy.load("llama", tensor=2).mesh(8) == Mesh(dp=4, tp=2)
    assert Policy.load("llama", tensor=2, data=4).mesh(8) == Mesh(dp=4, tp=2)


def test_a_policy_is_found_by_name_by_path_and_as_messages_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = Policy.load("llama")
    assert Policy.load(by_name.source) == by_name
    assert Policy.for_model("llama") == by_name
    own = Policy.load(write(tmp_path, 'family = "llama"\n[units]\n"model.layers.*" = "layer"\n'))
    assert own.source == str(tmp_path / "own.toml") and own.weights == ()


def test_a_model_type_without_a_file_gets_the_policy_that_its_model_will_say() -> None:
    policy = Policy.for_model("mamba", tensor=2)
    assert policy == Policy.load("auto", tensor=2) and policy.automatic
    assert policy.name == "auto" and policy.options.tensor == 2


def test_a_policy_travels_to_other_processes() -> None:
    policy = Policy.load("llama", tensor=2, seed=3)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(Policy.load("llama", tensor=2, seed=3))


def test_a_report_of_a_policy_has_every_entry_and_every_option_resolved() -> None:
    found = Policy.load("llama", tensor=2).as_dict()
    assert found["family"] == "llama" and found["source"] == "policies/llama.toml"
    assert found["weights"]["lm_head"] == "vocab" and found["units"]["model.layers.*"] == "layer"
    assert found["options"] == {
        "tensor": 2,
        "data": None,
        "pipeline": 1,
        "sequence_parallel": True,
        "zero": 0,
        "replicate": 1,
        "schedule": "1f1b",
        "virtual_stages": 1,
        "stage_layers": None,
        "recompute": "none",
        "offload": "none",
        "micro_batch": None,
        "precision": "bf16",
        "kernels": "all",
        "numerics": "hf",
        "attention": "auto",
        "compile": False,
        "compare_ranks": True,
        "seed": 0,
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(allow_abbrev=False)
    add_option_flags(found)
    return found


def test_only_the_flags_that_are_given_are_options() -> None:
    assert options_from(parser().parse_args([])) == {}
    words = ["--tensor", "2", "--sequence-parallel", "false", "--micro-batch=4", "--precision", "fp64", "--seed", "0"]
    expected = {"tensor": 2, "sequence_parallel": False, "micro_batch": 4, "precision": "fp64", "seed": 0}
    assert options_from(parser().parse_args(words)) == expected


def test_flags_ask_for_what_a_policy_asks_for() -> None:
    values = {"tensor": (1, 2), "data": (None, 3), "sequence_parallel": (True, False), "precision": ("bf16", "fp64")}
    for chosen in itertools.product(*values.values()):
        asked = dict(zip(values, chosen, strict=True))
        given = options_from(parser().parse_args(flags(asked)))
        assert given == {name: held for name, held in asked.items() if held is not None}
        assert Options(**given) == Options(**asked)


def test_flags_that_are_not_legal_are_reported_together_by_the_policy() -> None:
    options = options_from(parser().parse_args(["--tensor", "two", "--precision", "bf8", "--sequence-parallel", "yes"]))
    with pytest.raises(PolicyError, match="3 violations"):
        Policy.load("llama", **options)


def test_a_kernel_is_left_out_by_a_word_that_begins_with_a_minus() -> None:
    for words in (["--kernels", "-rotary,-swiglu", "--tensor", "2"], ["--tensor", "2", "--kernels=-rotary,-swiglu"]):
        found = options_from(parser().parse_args(joined(words)))
        assert found == {"kernels": "-rotary,-swiglu", "tensor": 2}
        assert options_from(parser().parse_args(flags(found))) == found
    options = Options(kernels=("-rotary", "-swiglu"))
    assert [name for name in ("rms_norm", "rotary", "swiglu") if options.places(name)] == ["rms_norm"]
    assert not Options(kernels="none").places("rms_norm")
