"""What policies must refuse, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardcomp.errors import PolicyError
from shardcomp.policy import Policy
from shardcomp.policy.options import Options

HEAD = 'family = "f"\n'


def refusal(folder: Path, text: str, **options: object) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        Policy.load(path, **options)
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path) + ": ")


def own(folder: Path, text: str) -> Policy:
    path = folder / "own.toml"
    path.write_text(HEAD + text)
    return Policy.load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + "[weight]\n", "line 2: unknown key or table 'weight': did you mean 'weights'?"),
        (
            HEAD + "colour = 1\n",
            "line 2: unknown key or table 'colour': a policy has 'family', [weights], [units], [kernels] and [options]",
        ),
        ("[weights]\n", 'no family: write family = "..." with the model_type'),
        ("family = 3\n", "line 1: family = 3: write family"),
        (
            HEAD + '[weights]\n"a" = "colwse"\n',
            'line 3: "a" = "colwse": use colwise, rowwise, vocab, whole; the nearest is colwise',
        ),
        (HEAD + '[weights]\n"a" = true\n', 'line 3: "a" = true: use colwise, rowwise, vocab, whole'),
        (
            HEAD + '[units]\n# a comment\n"a" = "layers"\n',
            'line 4: "a" = "layers": use first, layer, last; the nearest is layer',
        ),
        (HEAD + '[weights]\na.b = "vocab"\n', "line 3: a = ...: a pattern stands in quotes"),
        (HEAD + "weights = 3\n", "weights is not a table: write [weights] on a line of its own"),
        (HEAD + "options = 3\n", "line 2: options is a table"),
        (HEAD + '[weights]\n"a..b" = "vocab"\n', "line 3: \"a..b\": segment '' is neither a name"),
        (HEAD + '[weights]\n"a.x*" = "vocab"\n', "line 3: \"a.x*\": segment 'x*' is neither a name"),
        (HEAD + '[weights]\n"a.{b" = "vocab"\n', "segment '{b' is neither a name"),
        (HEAD + '[weights]\n"a.{b,}" = "vocab"\n', "segment '{b,}' is neither a name"),
        (
            HEAD + "[options]\ntensr = 2\n",
            "line 3: unknown option 'tensr': did you mean 'tensor'? The options are tensor, data",
        ),
        (HEAD + "[options]\nzero = 4\n", "line 3: zero = 4: use 0, 1, 2 or 3"),
        (HEAD + '[options]\ntensor = "2"\n', 'line 3: tensor = "2": use a whole number, 1 or more'),
        (HEAD + "[options]\nmicro_batch = 0\n", "line 3: micro_batch = 0: use a whole number, 1 or more"),
        (HEAD + "[options]\ndata = true\n", "line 3: data = true: use a whole number, 1 or more"),
        (
            HEAD + '[options]\nprecision = "fp46"\n',
            'line 3: precision = "fp46": use bf16, fp32, fp16 or fp64; the nearest is fp64',
        ),
        (HEAD + "[options]\nsequence_parallel = 1\n", "line 3: sequence_parallel = 1: use true or false"),
        (HEAD + "[options]\nseed = -1\n", "line 3: seed = -1: use a whole number, 0 or more"),
        (HEAD + "[options]\ntensor = 2\n", "tensor = 2, but no entry of [weights] splits anything"),
        (HEAD + '[weights]\n"a" = "vocab"\n"a" = "whole"\n', "is not a TOML file: Cannot overwrite a value (at line 4"),
    ],
)
def test_a_fault_of_a_file_is_named_with_its_line_and_what_would_do(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text).replace(str(tmp_path / "own.toml") + " ", "")


def test_all_faults_of_a_file_and_of_the_keywords_come_in_one_message(tmp_path: Path) -> None:
    said = refusal(tmp_path, '[weights]\n"a.." = "vocb"\n[options]\nseed = "x"\n', tensor=0, colour="red")
    assert said.startswith("6 violations")
    for part in ("no family", "segment ''", '"vocb"', 'seed = "x"', "tensor = 0", "'colour'"):
        assert part in said


def test_options_by_themselves_are_checked_together() -> None:
    with pytest.raises(PolicyError, match="3 violations"):
        Options(tensor=0, precision="fp8", seed=1.5)  # type: ignore[arg-type]


def test_an_option_without_a_default_value_may_not_be_none_where_it_needs_one() -> None:
    with pytest.raises(PolicyError, match="tensor = null"):
        Policy.load("llama", tensor=None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llame", "no policy 'llame': did you mean 'llama'? There are auto, bloom, cohere, "),
        ("nothing/of/it.toml", "no policy file 'nothing/of/it.toml'; shipped with shardcomp: bloom, cohere, "),
    ],
)
def test_a_policy_that_does_not_exist_is_refused_with_those_that_do(name: str, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load(name)
    assert said in str(caught.value)


def test_a_directory_is_not_a_policy(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no policy file"):
        Policy.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="is not a TOML file"):
        Policy.load(path)


def test_an_entry_that_matches_nothing_is_named_with_the_nearest_module(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"model.layers.*.q_prj" = "colwise"\n"nothing.of.it" = "rowwise"\n')
    with pytest.raises(PolicyError) as caught:
        policy.weight_entries([f"model.layers.{i}.q_proj.weight" for i in range(3)])
    assert "line 3: \"model.layers.*.q_prj\" matches no module; the nearest is 'model.layers.*.q_proj'" in str(caught.value)
    assert 'line 4: "nothing.of.it" matches no module' in str(caught.value)


def test_an_alternative_that_matches_nothing_is_named(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"layers.*.{q,k,vv}_proj" = "colwise"\n')
    with pytest.raises(PolicyError, match=r"alternative 'vv' matches no module; the nearest is 'layers.\*.v_proj'"):
        policy.weight_entries(["layers.0.q_proj.weight", "layers.0.k_proj.weight", "layers.0.v_proj.weight"])


def test_a_module_that_two_entries_claim_is_named_once_with_both(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"layers.*.q" = "colwise"\n"*.*.q" = "colwise"\n')
    with pytest.raises(PolicyError) as caught:
        policy.weight_entries([f"layers.{i}.q.weight" for i in range(5)])
    assert 'line 4: "*.*.q" claims layers.0.q and 4 more, which line 3: "layers.*.q" claims already' in str(caught.value)


def test_a_tied_weight_cannot_be_split_in_two_ways(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"embed" = "vocab"\n"head" = "colwise"\n')
    with pytest.raises(
        PolicyError, match="head.weight is tied to embed.weight, but line 4.*says colwise and line 3.*says vocab"
    ):
        policy.weight_entries(["embed.weight"], {"head.weight": "embed.weight"})


def test_a_unit_inside_a_unit_is_refused(tmp_path: Path) -> None:
    policy = own(tmp_path, '[units]\n"layers.*" = "layer"\n"layers.*.mlp" = "layer"\n')
    with pytest.raises(PolicyError, match="makes layers.0.mlp a unit inside the unit layers.0"):
        policy.unit_kinds(["layers.0", "layers.0.mlp"])


def test_a_policy_of_another_family_says_so_first() -> None:
    modules = ["transformer.wte", "transformer.h.0", "transformer.h.0.attn.c_attn", "lm_head"]
    with pytest.raises(PolicyError) as caught:
        Policy.load("llama").check([f"{module}.weight" for module in modules], modules, model_type="codegen")
    first = str(caught.value).splitlines()[1]
    assert (
        "1. this policy is for the family 'llama', but the model's type is 'codegen': no file has that family: use auto. Write"
        in first
    )


def test_a_policy_of_another_family_names_the_right_file(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"transformer.wte" = "vocab"\n')
    with pytest.raises(PolicyError, match="the model's type is 'llama': use policies/llama.toml"):
        policy.weight_entries(["model.embed_tokens.weight"], model_type="llama")


def test_misspelt_weights_and_units_come_in_one_message(tmp_path: Path) -> None:
    policy = own(tmp_path, '[weights]\n"a.c" = "vocab"\n[units]\n"a.d" = "layer"\n')
    with pytest.raises(PolicyError, match="2 violations"):
        policy.check(["a.b.weight"], ["a", "a.b"])


@pytest.mark.parametrize(
    ("options", "world", "said"),
    [
        ({"tensor": 2}, 7, "tensor = 2 does not divide a world of 7 ranks: use tensor = 1, 7"),
        ({"tensor": 16}, 8, "tensor = 16 does not divide a world of 8 ranks: use tensor = 1, 2, 4, 8"),
        ({"tensor": 1}, 0, "tensor = 1 does not divide a world of 0 ranks"),
        ({"tensor": 2, "data": 3}, 8, "make 6 ranks, but the world has 8: use data = 4, or leave it out"),
    ],
)
def test_degrees_that_do_not_make_the_world_are_refused(options: dict[str, int], world: int, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load("llama", **options).mesh(world)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_stages": 2}, "virtual_stages = 2 needs a pipeline"),
        ({"pipeline": 2, "virtual_stages": 2}, "use schedule = interleaved or zero_bubble"),
        ({"pipeline": 2, "schedule": "zbv", "virtual_stages": 3}, "zbv runs 2 on each rank"),
        (
            {"pipeline": 2, "stage_layers": (1, 2, 3)},
            "names 3 stages, but pipeline × virtual stages = 2 × 1 makes 2",
        ),
        ({"pipeline": 2, "stage_layers": (1, 0)}, "stage_layers = .*: use the number of layers of each stage"),
        ({"replicate": 2}, "replicate = 2 makes copies of what zero shards, but zero = 0"),
        ({"replicate": 2, "zero": 1, "data": 3}, "replicate = 2 does not divide data = 3: use 1, 3"),
        ({"offload": "all"}, "offload = all .* but zero = 0: use zero = 3"),
        ({"offload": ("model..layers",), "zero": 3}, "offload = .*: use none, optimizer, parameters, all or patterns of units"),
        ({"recompute": "every:0"}, 'recompute = "every:0": use none, full, selective or every:N'),
    ],
)
def test_options_that_forbid_each_other_are_refused_with_what_would_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.load("llama", **options)
