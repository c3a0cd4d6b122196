"""What every test shares: one thread per process, no network, hypothesis profiles, golden files, and which tests run.

`make test` runs as many cases of each test as fit in its time, see support/selection.py; `make long` runs all, or one slice."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path

# Before torch and transformers are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Captured calls of tests, some of which patch the capture, are never taken for those of the user.
os.environ["SHARDCOMP_CAPTURES"] = str(Path(__file__).parents[1] / "build" / "test-captures")

import hypothesis
import pytest
import torch
import torch._dynamo.config

from support.selection import LONG

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"

# The same draws every time, so that a change is judged by what it did; `make long` draws others.
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("long" if LONG else "ci")


def pytest_configure(config: pytest.Config) -> None:
    from support import slices

    slices.slice_of_environment()  # a bad one is refused before anything is collected
    # The models of tests are small: torch's cache of what operators give for fake tensors costs more than it saves.
    torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build the library of kernels before tests read what is written to stderr."""
    from shardcomp.kernels import library

    library.load()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests take captured calls from the cache, and so do processes that they start, but for tests of the capture itself."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("captures_anew") is not None:
            patch.setenv("SHARDCOMP_CAPTURES", "anew")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Note the CPU seconds of a test and of the processes that it started, for --update-durations."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", sum(os.times()[:4]) - before))


_cpu_seconds: defaultdict[str, list[float]] = defaultdict(list)
"""file::test -> of each case that ran. Filled where the tests are reported, which is not where they run."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _cpu_seconds[_function(report.nodeid)] += [held for name, held in report.user_properties if name == "cpu_seconds"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    from support import selection

    if session.config.getoption("--update-durations") and not hasattr(session.config, "workerinput"):
        selection.write_durations(_cpu_seconds)


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing with them")
    parser.addoption("--update-durations", action="store_true", help="write tests/durations.json from this run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that this run is about. Tests that are asked for by name always run."""
    from support import selection, slices

    if any("::" in argument for argument in config.args):
        return
    part = slices.slice_of_environment()
    selected = {item.nodeid for item in items if item.nodeid in part}
    if not LONG:
        seconds = selection.read_durations()
        functions = defaultdict(list)
        for item in items:
            if item.get_closest_marker("long"):
                selected.discard(item.nodeid)
            else:
                functions[_function(item.nodeid)].append(item)
        for name, cases in functions.items():
            grid = cases[0].get_closest_marker("grid") is not None
            count = selection.count_to_run(len(cases), seconds.get(name, 0), grid)
            selected -= {item.nodeid for item in cases} - selection.choose({i.nodeid: _indices(i) for i in cases}, count)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in selected])
    items[:] = [item for item in items if item.nodeid in selected]


def _indices(item: pytest.Item) -> dict[str, int]:
    """The parameters of a case: name -> index of its value."""
    callspec = getattr(item, "callspec", None)
    return dict(callspec.indices) if callspec is not None else {}


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


@pytest.fixture
def chunked_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are computed in chunks, as those of models with many tokens are."""
    from shardcomp.fusion import loss_head

    monkeypatch.setattr(loss_head, "_LEAST_ROWS", 2)
