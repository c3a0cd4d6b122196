"""What every test shares: one thread per process, no network, hypothesis profiles, golden files, and large grids of cases, of
which `make test` runs a quarter and `make long` all."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator
from pathlib import Path

# Before torch and transformers are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"

# The same draws every time, so that a change is judged by what it did; `make long` draws others.
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
LONG = os.environ.get("SHARDCOMP_LONG") == "1"
hypothesis.settings.load_profile("long" if LONG else "ci")


def pytest_configure(config: pytest.Config) -> None:
    from support import exports

    if not LONG:
        exports.share()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build the library of kernels before tests read what is written to stderr."""
    from shardcomp.kernels import library

    library.load()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    from support import exports

    exports.shared = item.get_closest_marker("exports_anew") is None
    return (yield)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing with them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked as a grid, keep the same quarter every time, unless cases are asked for by name."""
    if LONG or any("::" in argument for argument in config.args):
        return
    left = [each for each in items if each.get_closest_marker("grid") and zlib.crc32(each.name.encode()) % 4]
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [each for each in items if each not in gone]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: `text` must equal tests/golden/`name`."""
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        how = "if the change is intended, run pytest --update-golden and review the diff"
        assert path.exists(), f"{path} does not exist: {how}"
        assert text == path.read_text(), f"differs from {path}: {how}"

    return compare
