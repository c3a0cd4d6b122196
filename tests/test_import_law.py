"""The import law: each folder imports from the folders before it in the compiler's order, and never from those after it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAW = (
    "errors torch_private cache_dir",
    "ir",
    "policy presets",
    "sharding",
    "kernels",
    "capture fusion cost runtime weights",
    "passes",
    "pass_runner inspect policy.auto",
    "lowered lowering step",
    "materialize",
    "planner checkpoint training verification",
    "cli",
)
"""The order. Folders on one line may import each other."""
LAYERS = {f"shardcomp.{name}": layer for layer, names in enumerate(LAW) for name in names.split()}


def _modules() -> Iterator[tuple[str, list[str]]]:
    """Every module of shardcomp, and the modules that it imports when it is imported itself."""
    paths = [*(ROOT / "shardcomp").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    files = {_name(path): path for path in paths if not path.is_relative_to(ROOT / "shardcomp" / "passes")}
    for name, path in files.items():
        imported = []
        for node in _module_level(ast.parse(path.read_text()).body):
            if isinstance(node, ast.Import):
                imported += [alias.name for alias in node.names]
            elif node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported += [full if full in files else node.module for full in names]
        yield name, imported


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "shardcomp" else ("shardcomp", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _module_level([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _module_level([*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)])


def _layer(module: str) -> int | None:
    """Where a module stands in the law: `policy.auto` by itself, and not as a part of `policy`."""
    while module:
        if module in LAYERS:
            return LAYERS[module]
        module = module.rpartition(".")[0]
    return None


MODULES = dict(_modules())


def test_no_module_imports_what_comes_after_it() -> None:
    wrong = []
    for name, imported in MODULES.items():
        here = _layer(name)
        for other in imported:
            there = _layer(other)
            if other.split(".")[0] in ("examples", "benchmarks", "tests") or None not in (here, there) and there > here:  # type: ignore[operator]
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_round_about() -> None:
    sorter = graphlib.TopologicalSorter({name: [o for o in imported if o in MODULES] for name, imported in MODULES.items()})
    sorter.prepare()  # raises CycleError, with the circle


def test_the_runtime_loads_nothing_of_the_compiler() -> None:
    """sympy is loaded all the same: torch.distributed.fsdp imports it."""
    folders = (
        "capture",
        "fusion",
        "cost",
        "passes",
        "pass_runner",
        "inspect",
        "lowering",
        "lowered",
        "planner",
        "verification",
    )
    code = "import sys, shardcomp.runtime; print(*(name for name in sys.modules if name.startswith('shardcomp')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "shardcomp.runtime.model" in loaded
    assert not [name for name in loaded if name.split(".")[1:2] and name.split(".")[1] in folders]
