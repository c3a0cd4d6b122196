"""The policy `auto`: it finds units and splits without names, and sends no more than transformers' own plan would."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardcomp
from shardcomp import Policy, PolicyError, presets
from shardcomp.lowered import Lowered
from support.families import tiny_config
from support.models import tiny


def entries(found: Lowered) -> tuple[dict[str, str], dict[str, str]]:
    policy = found.policy
    return tuple({e.pattern.text: e.value for e in table} for table in (policy.weights, policy.units))  # type: ignore[return-value]


def auto(model: Any, **options: Any) -> Lowered:
    return shardcomp.lower(model, Policy.load("auto", **{"tensor": 2, **options}), seq=48)


def sent(found: Lowered) -> list[tuple[Any, ...]]:
    """Every message but for where it is sent."""
    return sorted((m["op"], m["axis"], m["phase"], m["count"], m["bytes"]) for m in found.report()["collectives"])


def test_a_llama_is_split_as_its_policy_file_splits_it() -> None:
    weights, units = entries(auto(tiny()))
    assert weights == {
        "model.embed_tokens": "vocab",
        "lm_head": "vocab",
        "model.layers.*.self_attn.{q_proj,k_proj,v_proj}": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.{gate_proj,up_proj}": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    assert units == {"model.embed_tokens": "first", "model.layers.*": "layer", "lm_head": "last"}


def renamed(model: nn.Module, seed: int) -> nn.Module:
    """The model with another name for every module and parameter; its code still says the old ones."""
    drawn = random.Random(seed)
    for module in list(model.modules()):
        table: dict[str, str] = {}
        for held in (module._modules, module._parameters):
            new = {old: "".join(drawn.choices(string.ascii_lowercase, k=8)) for old in held}
            table |= new
            held_now = {new[old]: each for old, each in held.items()}
            held.clear()
            held.update(held_now)
        module.__class__ = _speaking(type(module), table)
    return model


def _speaking(kind: type[nn.Module], table: dict[str, str]) -> type[nn.Module]:
    def look_up(self: nn.Module, name: str) -> Any:
        return kind.__getattr__(self, table.get(name, name))

    return type(kind.__name__, (kind,), {"__getattr__": look_up, "__module__": kind.__module__})


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_without_names_and_plan_it_sends_what_the_policy_file_sends(tied: bool, sequence_parallel: bool) -> None:
    config = tiny(tie_word_embeddings=tied, attention_bias=True, num_hidden_layers=3)
    model = renamed(presets.build(config), seed=3)
    model._tp_plan = None  # type: ignore[assignment]
    assert not any(word in name for name, _ in model.named_parameters() for word in ("proj", "layer", "weight", "0"))
    found = auto(model, sequence_parallel=sequence_parallel)
    policy = Policy.load("llama", tensor=2, sequence_parallel=sequence_parallel)
    assert sent(found) == sent(shardcomp.lower(config, policy, seq=48))
    assert len([unit for unit in found.program.units if unit.kind == "layer"]) == 3


def test_a_renamed_model_agrees_with_the_dense_model() -> None:
    model = shardcomp.initialize(renamed(presets.build(tiny()), seed=4), 0)
    found = shardcomp.verify(model, Policy.load("auto", tensor=2, precision="fp64"), kinds=("causal",))
    assert found.ok, found.worst


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_single_layer_is_found(kind: str) -> None:
    layers = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    one, two = (auto(tiny_config(kind, **{layers: count})) for count in (1, 2))
    weights = {pattern.replace(".0.", ".*."): word for pattern, word in entries(one)[0].items()}
    assert weights == entries(two)[0]
    assert [unit.kind for unit in one.program.units] == ["first", "layer", "last"]


def test_layers_of_several_kinds_are_all_units() -> None:
    found = auto(tiny_config("gemma3_text"))
    assert [unit.kind for unit in found.program.units] == ["first", "layer", "layer", "last"]


def test_parts_of_a_packed_weight_have_one_word() -> None:
    assert entries(auto(tiny_config("gpt2")))[0]["transformer.h.*.attn.c_attn"] == "colwise"


def test_a_norm_over_features_that_are_cut_is_cut() -> None:
    weights = entries(auto(tiny_config("olmo2")))[0]
    assert weights["model.layers.*.self_attn.{q_proj,q_norm,k_proj,k_norm,v_proj}"] == "colwise"


def test_the_plan_of_transformers_is_taken_where_it_splits_as_much_and_sends_less() -> None:
    model = presets.build(tiny())
    model._tp_plan = {"model.layers.*.self_attn.q_proj": "replicated"}  # type: ignore[assignment]
    assert entries(auto(model)) == entries(auto(tiny()))  # it would split less


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "cohere", "olmo2", "gpt_neox"])
def test_it_sends_no_more_than_the_plan_of_transformers(kind: str) -> None:
    from shardcomp.policy.auto import _with_plan

    model = presets.build(tiny_config(kind))
    found = auto(model)
    plan = dict(model._tp_plan)  # type: ignore[arg-type]
    words = _with_plan({"lm_head": "vocab"}, plan, found.program)
    named = {m: w for m, w in words.items() if w in ("colwise", "rowwise")}
    assert named, "the plan names no weight of this model"
    own = found.policy.weight_entries(found.program.parameters, found.program.canonical_names())
    mine = {found.program.parameters[name].module: word for name, word in own.items()}
    theirs = tuple(e for e in _policy({**mine, **named}, found).weights)
    planned = shardcomp.lower(model, Policy("plan", theirs, found.policy.units, {"tensor": 2}), seq=48)

    def total(lowered: Lowered) -> int:
        return sum(m["bytes"] for m in lowered.report()["collectives"] if m["axis"] == "tp")

    assert total(found) <= total(planned)


def _policy(words: dict[str, str], found: Lowered) -> Policy:
    from shardcomp.policy.patterns import Entry, parse

    return Policy("plan", tuple(Entry(parse(m), w) for m, w in words.items()), found.policy.units, {"tensor": 2})


def test_heads_that_do_not_divide_are_refused_with_the_degrees_that_do() -> None:
    with pytest.raises(PolicyError, match="num_attention_heads = 4 .*cannot be split over tensor = 3: use 1, 2"):
        auto(tiny(hidden_size=48, head_dim=12), tensor=3)


class Plain(nn.Module):
    """One product, with the logits or with nothing behind it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.a = nn.Linear(8, classes)

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        x = self.a(nn.functional.one_hot(input_ids, 8).to(self.a.weight.dtype))
        return {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}


def test_a_model_that_is_nothing_but_a_head_is_cut_by_vocabulary() -> None:
    assert entries(auto(Plain(8)))[0] == {"a": "vocab"}


class Block(nn.Module):
    """Attention of four heads over 16 features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each(x).unflatten(2, (-1, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


class InTurns(nn.Module):
    """Two blocks that read each other's results, twice."""

    def __init__(self, within: bool = True) -> None:
        super().__init__()
        blocks = {"table": nn.Embedding(32, 16), "fast": Block(), "slow": Block()}
        if within:
            self.body = nn.ModuleDict(blocks)
        else:
            self.table, self.fast, self.slow = blocks.values()
        self.head = nn.Linear(16, 32)

    def block(self, name: str) -> Any:
        return self.body[name] if hasattr(self, "body") else getattr(self, name)

    def get_input_embeddings(self) -> nn.Module:
        return self.block("table")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = slow = self.block("table")(input_ids)
        for _ in range(2):
            slow = self.block("slow")(self.block("fast")(x + slow))
        logits = self.head(slow)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


@pytest.mark.parametrize(
    ("within", "units"), [(True, {"body": "layer", "head": "last"}), (False, {"table": "first", "head": "last"})]
)
def test_modules_that_run_in_turns_are_one_unit(within: bool, units: dict[str, str]) -> None:
    torch.manual_seed(0)
    found = auto(InTurns(within))
    assert entries(found)[1] == units
    assert {word for name, word in entries(found)[0].items() if ".o" in name} == {"rowwise"}
    agreed = shardcomp.verify(InTurns(within), Policy.load("auto", tensor=2, precision="fp64"), 2)
    assert agreed.ok, agreed.worst


def test_a_unit_that_would_run_twice_is_refused(tmp_path: Path) -> None:
    units = "".join(f'"body.{name}" = "{kind}"\n' for name, kind in (("table", "first"), ("fast", "layer"), ("slow", "layer")))
    (tmp_path / "turns.toml").write_text(f'family = "turns"\n[units]\n{units}')
    with pytest.raises(PolicyError, match="body.fast reads what body.slow gives, which runs after it"):
        shardcomp.lower(InTurns(), Policy.load(tmp_path / "turns.toml"), seq=16)


class InLine(InTurns):
    """Each block once."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.head(self.body["slow"](self.body["fast"](self.body["table"](input_ids))))
        return {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}  # type: ignore[union-attr]


def test_what_lies_beside_layers_is_not_taken_for_one() -> None:
    """As `body.*` would."""
    assert entries(auto(InLine()))[1] == {"body.table": "first", "body.fast": "layer", "body.slow": "layer", "head": "last"}
