"""A device's kernels run only where they have given what references do, without a call that is slower for it."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernels import emulated
from kernels.test_emulation import _possible

from shardcomp.errors import KernelError
from shardcomp.kernels import device_check, library, small_cases
from shardcomp.kernels.register import REFERENCES

CUDA = torch.device("cuda", 0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """A device with kernels of every operator: which were compared, and which then took their place."""
    seen: dict[str, list[str]] = {"compared": [], "placed": []}
    monkeypatch.setattr(device_check, "_rejected", {})
    monkeypatch.setattr(device_check, "_waits", lambda name, kind: kind == "cuda")
    monkeypatch.setattr(device_check, "_compare", lambda name, device, reference: seen["compared"].append(name))
    monkeypatch.setattr(device_check, "_put_in_place", seen["placed"].append)
    monkeypatch.setattr(library, "provides", lambda name, kind: name in seen["placed"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    yield seen


def refuse(*_: Any) -> None:
    raise AssertionError("it is\noff by 3")


def test_a_kernel_is_compared_once_and_then_runs(pretended: dict[str, list[str]]) -> None:
    for name in ("rms_norm", "rms_norm_bwd", "rms_norm"):
        assert device_check.in_place(name, CUDA, REFERENCES[name])
    assert pretended == {"compared": ["rms_norm", "rms_norm_bwd"], "placed": ["rms_norm", "rms_norm_bwd"]}


def test_one_that_differs_leaves_its_reference_and_one_warning(
    pretended: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_check, "_compare", refuse)
    for _ in range(3):
        assert not device_check.in_place("rotary", CUDA, REFERENCES["rotary"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "rotary runs as its reference on cuda:0: AssertionError: it is off by 3" in caplog.text
    assert pretended["placed"] == [] and device_check.why_not("rotary", CUDA) == "AssertionError: it is off by 3"


def test_one_that_differs_is_an_error_where_its_library_is_named(
    pretended: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_check, "_compare", refuse)
    monkeypatch.setenv(library.VARIABLE, "aot")
    for _ in range(2):
        with pytest.raises(KernelError, match="SHARDCOMP_KERNELS=aot: its kernel of rotary must not run on cuda:0: .* by 3"):
            device_check.in_place("rotary", CUDA, REFERENCES["rotary"])
    assert not caplog.records


def test_nothing_is_compared_on_the_cpu_nor_while_a_graph_is_recorded(
    pretended: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not device_check.in_place("rms_norm", torch.device("cpu"), REFERENCES["rms_norm"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not device_check.in_place("rms_norm", CUDA, REFERENCES["rms_norm"])
    assert pretended["compared"] == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert device_check.in_place("rms_norm", CUDA, REFERENCES["rms_norm"]), "it may be tried later"


def test_nothing_is_compared_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "in_place", refuse)

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.shardcomp.rms_norm(x, None, 1e-5, 0.0, True)[0]

    graph = torch.export.export(Norm(), (torch.ones(2, 3),)).graph
    assert any("rms_norm" in str(node.target) for node in graph.nodes)
    with torch._subclasses.FakeTensorMode():
        assert torch.ops.shardcomp.rms_norm(torch.empty(2, 3, device="cuda"), None, 1e-5, 0.0, True)[0].device.type == "cuda"


@pytest.mark.parametrize("name", REFERENCES)
def test_the_comparison_takes_what_is_right_and_refuses_what_is_not(name: str) -> None:
    cpu, reference = torch.device("cpu"), REFERENCES[name]
    small_cases.compare(name, reference, reference, cpu)
    with pytest.raises(AssertionError):
        small_cases.compare(name, spoiled(reference), reference, cpu)


def spoiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for one number in three that is off by a twentieth."""

    def off(*arguments: Any) -> Any:
        made = run(*arguments)
        results = made if isinstance(made, tuple) else [arguments[0] if made is None else made]
        for each in results:
            for held in each if isinstance(each, list) else [each]:
                held.view(-1)[::3] *= 1.05
        return made

    return off


PROGRAM = """
    import ctypes, sys, torch
    from shardcomp.kernels import device_check, library, small_cases
    from shardcomp.kernels import register, rms_norm
    import kernels.emulated as emulated

    path = sys.argv[1]
    device_check.SPACES["cpu"] = emulated.SPACE
    held = torch.library.Library(emulated.SPACE, "FRAGMENT")
    for name in register.REFERENCES:
        held.define(str(getattr(torch.ops.shardcomp, name).default._schema).removeprefix("shardcomp::"))
    torch.ops.load_library(path)
    library._loaded = library.Library("jit", path, "")
    compared = []
    before = small_cases.compare
    small_cases.compare = lambda name, *rest: (compared.append(name), before(name, *rest))
    x = torch.arange(1.0, 25.0).reshape(4, 6).requires_grad_()
    made = []
    for _ in range(3):
        y = rms_norm(x, eps=1e-5)
        made.append((y, *torch.autograd.grad(y[:, 0].sum(), x)))
        register.device_check.in_place, refused = None, register.device_check.in_place  # nothing asks any more
        torch.ops.shardcomp.rms_norm(x.detach(), None, 1e-5, 0.0, False)
        register.device_check.in_place = refused
    assert sorted(compared) == ["rms_norm", "rms_norm_bwd"], compared
    expected = torch.nn.functional.rms_norm(x, (6,), eps=1e-5)
    torch.testing.assert_close(made[0][0], expected)
    torch.testing.assert_close(made[2][1], torch.autograd.grad(expected[:, 0].sum(), x)[0])
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("shardcomp::rms_norm", "CPU") and not has("shardcomp::rotary", "CPU")
    for name, reference in register.REFERENCES.items():
        assert device_check.in_place(name, torch.device("cpu"), reference), device_check.why_not(name, torch.device("cpu"))
    print("every kernel is in its place")
"""


@pytest.mark.skipif(not _possible(), reason="there is no compiler with AddressSanitizer")
def test_kernels_of_the_emulated_device_take_their_places() -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(emulated.build())]
    done = subprocess.run(command, env=emulated.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "every kernel is in its place\n", done.stderr
