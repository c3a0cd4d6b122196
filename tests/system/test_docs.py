"""The pages: what they name exists, what they print is what is printed, and the site is built without a warning.

The site itself is built where the packages of `make docs` are installed; all else is tested everywhere.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardcomp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FRONT = ROOT / "README.md"
PAGES = [FRONT, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "policies/README.md", *sorted(DOCS.rglob("*.md"))]
LAW = [
    ("errors",),
    ("ir",),
    ("policy",),
    ("sharding",),
    ("kernels",),
    ("capture", "fusion", "cost", "runtime", "weights", "presets"),
    ("passes",),
    ("pass_runner", "inspect"),
    ("lowering",),
    ("materialize",),
    ("checkpoint", "training", "verification"),
    ("cli",),
]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    pages: dict[str, str] = load(DOCS / "generate.py").pages()
    return pages


@pytest.fixture(scope="module")
def lowered() -> Any:
    return shardcomp.lower("tiny", shardcomp.Policy.load("llama", tensor=2), seq=64)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "index.html").exists()


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    yield from (address for address in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", address))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path, generated: dict[str, str]) -> None:
    made = {DOCS / path for path in generated}
    for link in links(page):
        file = (page.parent / link.partition("#")[0]).resolve() if not link.startswith("#") else page
        assert file.exists() or file in made, f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    folders = "tests|benchmarks|examples|passes|policies|csrc|shardcomp"
    named = re.findall(rf"\b((?:{folders})/[\w/.-]+\.(?:py|toml|json|cpp|cu|h))\b", page.read_text())
    own = ("olmo", "drop_double_negation", "relu2")  # what a recipe asks to write
    missing = [name for name in named if not (ROOT / name).exists() and not any(word in name for word in own)]
    assert not missing


def test_every_row_of_the_claims_names_a_test_that_exists() -> None:
    table = (DOCS / "verification.md").read_text().partition("| claim |")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) > 20
    for row in rows:
        last = row.rstrip(" |").rpartition(" | ")[2]
        files = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", last)
        assert files or "module_contract.md" in last, row
        for file, name in files:
            text = (ROOT / file).read_text()
            assert re.search(rf"^def {name or 'test_'}", text, re.MULTILINE), file
        for path in re.findall(r"pytest ((?:tests/[\w/.]+ ?)+)", row):
            assert all((ROOT / each).exists() for each in path.split()), row


def test_the_front_page_is_short_and_has_the_two_commands() -> None:
    text = FRONT.read_text()
    assert len(text.split()) <= 900
    assert "make pretrain" in text and "make test" in text


def test_the_picture_shows_lines_of_the_listing_and_of_the_policy(lowered: Any) -> None:
    drawn = load(DOCS / "images/draw.py")
    assert drawn.picture() == (DOCS / "images/front.svg").read_text()
    listing = [line.partition("  # ")[0].strip() for line in lowered.listing().splitlines()]  # without the lines of the model
    shown = drawn.EMITTED.splitlines()
    start = listing.index(shown[0])
    assert listing[start : start + 8] == shown
    policy = " ".join((ROOT / "policies/llama.toml").read_text().split())
    assert len(drawn.POLICY.splitlines()) == 7
    assert all(" ".join(line.split()) in policy for line in drawn.POLICY.splitlines())
    source = Path(str(importlib.util.find_spec("transformers.models.llama.modeling_llama").origin)).read_text()  # type: ignore[union-attr]
    assert all(line in source for line in drawn.MODEL.splitlines() if not line.startswith("#"))


def test_every_option_command_and_pass_has_its_section(generated: dict[str, str]) -> None:
    from shardcomp.lowering import PASSES
    from shardcomp.policy.options import Options

    assert all(f"## `{name}`" in generated["reference/options.md"] for name in Options().as_dict())
    for name in ("inspect", "verify", "resume-check", "convert", "env"):
        assert f"## `shardcomp {name}`" in generated["reference/cli.md"]
    for module in PASSES:
        assert f"## {module.__name__.rpartition('.')[2]}\n" in generated["reference/passes.md"]
    made = [text for path, text in generated.items() if path.startswith("reference/")]
    assert all('!!! note "Generated"' in text for text in made)


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """The keys of a report as the page writes them: `stages[].units`. What names are keys of is written `{}`."""
    if path in ("policy.weights", "policy.units", "policy.options"):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            name = "{}" if path == "kernels" else key
            whole = f"{path}.{name}" if path else name
            yield whole
            yield from keys_of(inner, whole)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner, f"{path}[]")


def test_the_page_of_report_keys_has_every_key_of_a_report(lowered: Any) -> None:
    text = (DOCS / "reference/report_keys.md").read_text().partition("## Of a report")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    seen = set(keys_of(lowered.report()))
    assert seen <= documented, seen - documented
    rare = {key for key in documented if key.startswith(("missed[]", "degraded[]"))}
    assert documented - seen <= rare, documented - seen


def imports(path: Path) -> Iterator[str]:
    """The folders or modules of shardcomp that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing = {id(n) for branch in ast.walk(tree) if _is_typing(branch) for n in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing and (node.module or "").partition(".")[0] == "shardcomp":
            names = [f"shardcomp.{each.name}" for each in node.names] if node.module == "shardcomp" else [str(node.module)]
            yield from (name.split(".")[1] for name in names)


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_page_of_the_architecture_lists_every_file_that_breaks_the_import_law() -> None:
    place = {name: number for number, names in enumerate(LAW) for name in names}
    page = (DOCS / "architecture.md").read_text()
    law = page.partition("## The import law")[2]
    order = re.findall(r"\w+", law.partition("```")[2].partition("```")[0])
    assert order == [name for names in LAW for name in names]
    breaking = set()
    for file in [*(ROOT / "shardcomp").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        parts = file.relative_to(ROOT / "shardcomp" if "shardcomp" in file.relative_to(ROOT).parts else ROOT).parts
        here = place.get(parts[0].removesuffix(".py"))
        if here is not None and any(place.get(name, -1) > here for name in imports(file)):
            breaking.add(str(file.relative_to(ROOT)))
    assert breaking <= set(re.findall(r"`([\w/]+\.py)`", law)), breaking
