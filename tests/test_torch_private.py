"""The private names of torch are where `shardcomp.torch_private` looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shardcomp import torch_private

FOLDER = Path(torch_private.__file__).parent
EXCEPT = {
    "torch_private.py",
    "runtime/fsdp.py",  # has FSDP2's
    "ir/operators.py",  # a table of ATen operators, by their names
}


@pytest.mark.parametrize("name", sorted(torch_private._NAMES))
def test_torch_has_the_name(name: str) -> None:
    assert getattr(torch_private, name) is not None


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        torch_private.no_such_name  # noqa: B018


def test_tensors_that_share_memory_have_one_storage_id() -> None:
    x, y = torch.ones(4), torch.ones(4)
    assert torch_private.storage_id(x) == torch_private.storage_id(x[2:]) != torch_private.storage_id(y)


PRIVATE = re.compile(r"\btorch\.(?:\w+\.)*_[a-zA-Z]|\baten\._[a-z]|from torch(?:\.\w+)* import (?:.*, )?_\w|\._cdata\b")
PACKAGE = re.compile(r"from torch(?:\.\w+)*\._\w+(?:\.\w+)* import|torch\._C\b")


def test_no_other_file_uses_private_names() -> None:
    paths = {str(path.relative_to(FOLDER)): path for path in FOLDER.rglob("*.py")}
    paths |= {f"passes/{path.name}": path for path in (FOLDER / "passes").glob("*.py")}  # a link, which rglob does not follow
    assert "passes/emit.py" in paths
    lines = [
        f"{name}: {line.strip()}"
        for name, path in paths.items()
        if name not in EXCEPT
        for line in re.sub(r"# .*", "", path.read_text()).splitlines()
        if PRIVATE.search(line.replace("torch.__version__", "")) or PACKAGE.search(line)
    ]
    assert not lines


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_graph_task_id()",
        "torch.ops.aten._safe_softmax(x, -1)",
        "aten._to_copy.default",
        "from torch.utils import _pytree as pytree",
        "from torch.utils import data, _pytree",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch._ops import HigherOrderOperator",
        "tensor.untyped_storage()._cdata",
    ],
)
def test_a_private_name_is_seen(line: str) -> None:
    assert PRIVATE.search(line) or PACKAGE.search(line)
