"""The examples in the docstrings of these modules run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "cli",
    "errors",
    "inspect.diff",
    "inspect.report",
    "policy.options",
    "policy.policy",
    "presets",
    "presets.shrinking",
    "training.loss_monitor",
    "training.sample_stream",
    "training.stack_location",
    "verification.dense_model",
    "verification.thread_ranks",
    "verification.verifier",
)


@pytest.mark.parametrize("name", MODULES)
def test_every_example_of_a_module_runs(name: str) -> None:
    module = importlib.import_module(f"shardcomp.{name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0
