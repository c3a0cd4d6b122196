"""The private names of torch are where `shardcomp.torch_private` looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shardcomp import torch_private

FOLDER = Path(torch_private.__file__).parent
MOVED = ("runtime", "weights", "checkpoint", "materialize.py")
"""What imports private names from one place only."""


@pytest.mark.parametrize("name", sorted(torch_private._NAMES))
def test_torch_has_the_name(name: str) -> None:
    assert getattr(torch_private, name) is not None


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        torch_private.no_such_name  # noqa: B018


def test_tensors_that_share_memory_have_one_storage_id() -> None:
    x, y = torch.ones(4), torch.ones(4)
    assert torch_private.storage_id(x) == torch_private.storage_id(x[2:]) != torch_private.storage_id(y)


def test_no_other_file_uses_private_names() -> None:
    paths = [path for name in MOVED for path in ([FOLDER / name] if name.endswith(".py") else (FOLDER / name).rglob("*.py"))]
    private = re.compile(r"\btorch\.(?:[a-z_]+\.)*_[a-zA-Z]|from torch[.\w]* import (?:.*, )?_\w")
    lines = [
        f"{path.relative_to(FOLDER)}: {line.strip()}"
        for path in paths
        if path != FOLDER / "runtime" / "fsdp.py"
        for line in path.read_text().splitlines()
        if private.search(line.replace("torch.__version__", ""))
    ]
    assert not lines
