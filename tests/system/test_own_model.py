"""policies/README.md: the model on that page is one that transformers does not know, and everything said of it is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardcomp

PAGE = Path(__file__).parents[2] / "policies" / "README.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the page."""
    folder = tmp_path_factory.mktemp("own")
    for text in re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / text.split()[1].rstrip(":")).write_text(text)
    return folder


@pytest.fixture(scope="module")
def heron(files: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("heron", files / "heron.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["heron"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(heron: ModuleType) -> Any:
    return heron.Heron(heron.HeronConfig(depth=2))


def test_the_policy_file_says_what_auto_finds(heron: ModuleType, files: Path) -> None:
    written = shardcomp.lower(small(heron), shardcomp.Policy.load(files / "heron.toml", tensor=2), seq=16).report()
    found = shardcomp.lower(small(heron), shardcomp.Policy.load("auto", tensor=2), seq=16).report()
    for key in ("weights", "units"):
        assert written["policy"][key] == found["policy"][key]
    shown = PAGE.read_text()
    assert f"weights {found['policy']['weights']}" in shown and f"units {found['policy']['units']}" in shown
    assert written["collectives"] == found["collectives"]


def test_the_model_agrees_with_itself_on_the_batches_that_it_takes(heron: ModuleType, files: Path) -> None:
    chosen = shardcomp.Policy.load(files / "heron.toml", tensor=4, precision="fp64")
    found = shardcomp.verify(small(heron), chosen)
    assert found.ok, found.worst
    assert found.batches == ("causal",)


def test_sizes_stay_free_where_a_model_shifts_its_labels_itself(heron: ModuleType) -> None:
    lowered = shardcomp.lower(small(heron), shardcomp.Policy.load("auto", tensor=2), seq=16)
    assert lowered.program.static_shape is None
