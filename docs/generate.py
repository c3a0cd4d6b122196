"""Generates pages from the code whenever the site is built. mkdocs.yml names this file as a hook of mkdocs.

The generated pages are not committed. `pages()` returns their text; it needs shardcomp, but not mkdocs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

COPIES = {
    "README.md": "index.md",
    "policies/README.md": "guide/own_model.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository that are pages of the site as well."""


def pages() -> dict[str, str]:
    """Path below docs/ -> the text of a generated page."""
    texts = {target: copied(source, target) for source, target in COPIES.items()}
    texts["reference/options.md"] = options_page()
    texts["reference/cli.md"] = cli_page()
    texts["reference/api.md"] = api_page()
    texts["reference/passes.md"] = passes_page()
    return texts


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has collected the files of docs/."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))  # the pages are about this checkout, wherever shardcomp is installed from
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def mark(source: str) -> str:
    return f'!!! note "Generated"\n    `docs/generate.py` writes this page from {source} when the site is built.\n'


def copied(source: str, target: str) -> str:
    """A file of the repository, with its links as the site needs them. A link to anything but a page becomes plain text."""

    def relink(link: re.Match[str]) -> str:
        text, address = link[1], link[2]
        if re.match(r"https?:|#", address):
            return link[0]
        address, hash_, anchor = address.partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(source), address))
        page = COPIES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page is None:
            return text if text.startswith("`") else f"{text} (`{file}`)"
        return f"[{text}]({os.path.relpath(page, os.path.dirname(target) or '.')}{hash_}{anchor})"

    text = (ROOT / source).read_text()
    return f"<!-- Generated from {source}. -->\n\n" + re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", relink, text)


def options_page() -> str:
    from shardcomp.policy.options import Options

    lines = ["# Options", "", mark("`shardcomp/policy/options.py`"), ""]
    lines += [
        "An option is set in the `[options]` table of a policy file, as a keyword of `Policy.load`, or as a flag. Keywords and",
        "flags win over the file. Where the default is `None`, it depends on other options, as the sentence says.",
        "",
        "What an option does, and which ones exclude each other: [plans](../guide/plans.md).",
        "",
    ]
    for option in fields(Options):
        legal, meaning = option.metadata["legal"], option.metadata["meaning"]
        lines += [f"## `{option.name}`", "", sentence(meaning), ""]
        lines += ["| flag | values | default |", "| --- | --- | --- |"]
        flag = f"`--{option.name.replace('_', '-')} {legal.placeholder}`"
        lines += [f"| {flag.replace('|', '&#124;')} | {legal.words} | `{option.default!r}` |", ""]
    return "\n".join(lines)


def sentence(text: str) -> str:
    """A help text as a sentence."""
    return text[0].upper() + text[1:] + "."


def cli_page() -> str:
    from shardcomp import cli

    lines = ["# Command line", "", mark("the argument parsers"), ""]
    lines += ["Exit status: 0 good, 1 the answer is no, 2 bad input, 3 a fault of shardcomp.", ""]
    parser = cli._parser()
    for name, command in subcommands(parser).items():
        lines += [f"## `shardcomp {name}`", "", f"{command.description}", "", *fenced(command)]
    sys.path.insert(0, str(ROOT / "examples" / "llama"))
    try:
        pretrain = importlib.import_module("pretrain").parser()
    finally:
        sys.path.pop(0)
    pretrain.prog = "pretrain.py"
    return "\n".join([*lines, "## `examples/llama/pretrain.py`", "", *fenced(pretrain)])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> the parser of a command."""
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def fenced(parser: argparse.ArgumentParser) -> list[str]:
    """The help of a parser, of one width whatever the terminal."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "118"
    try:
        return ["```text", parser.format_help().rstrip(), "```", ""]
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def api_page() -> str:
    import shardcomp

    lines = ["# Python API", "", mark("the docstrings of the public names"), ""]
    lines += ["Everything is imported as `shardcomp.NAME`.", ""]
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in shardcomp.__all__:
        value = getattr(shardcomp, name)
        if isinstance(value, ModuleType) or value.__name__ != name:  # a module, or a second name of something
            continue
        error = isinstance(value, type) and issubclass(value, Exception)
        group = "Errors" if error else "Classes" if isinstance(value, type) else "Functions"
        groups[group].append(f"{value.__module__}.{name}")
    from shardcomp.lowered import Lowered
    from shardcomp.runtime.model import ShardedModel

    groups["Classes"] += [f"{value.__module__}.{value.__name__}" for value in (ShardedModel, Lowered)]
    for title, names in groups.items():
        lines += [f"## {title}", ""]
        for path in names:
            lines += [f"::: {path}", "    options:", "      heading_level: 3", ""]
    lines += ["## shardcomp.checkpoint", ""]
    from shardcomp import checkpoint

    for name in checkpoint.__all__:
        value = getattr(checkpoint, name)
        lines += [f"::: {value.__module__}.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def passes_page() -> str:
    from shardcomp.lowering import PASSES

    lines = ["# Passes", "", mark("`shardcomp.lowering.PASSES` and the docstring of each pass"), ""]
    lines += ["`lower()` runs these in order. Each requires what others provide, which is checked before anything runs.", ""]
    lines += ["| | pass | requires | provides |", "| --- | --- | --- | --- |"]
    for number, module in enumerate(PASSES, 1):
        name = module.__name__.rpartition(".")[2]
        requires, provides = (words(getattr(module.CONTRACT, key)) for key in ("requires", "provides"))
        lines.append(f"| {number} | [{name}](#{name}) | {requires} | {provides} |")
    for module in PASSES:
        name = module.__name__.rpartition(".")[2]
        lines += ["", f"## {name}", "", f"`passes/{name}.py`", "", *docstring(module)]
    return "\n".join([*lines, ""])


def words(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) or "nothing"


def docstring(module: ModuleType) -> Iterator[str]:
    """The docstring of a module as Markdown: a list needs an empty line before it, a code block one with its language."""
    text = (ast.get_docstring(ast.parse(Path(str(module.__file__)).read_text())) or "").splitlines()
    inside = False
    for before, line in zip(["", *text], text, strict=False):
        code = line.startswith("    ")
        if code and not inside and not before:
            yield "```text"
            inside = True
        elif inside and not code and line:
            yield "```"
            yield ""
            inside = False
        if line.startswith("- ") and before and not before.startswith(("- ", "  ")):
            yield ""
        if not line.startswith(("- ", "  ")) and before.startswith(("- ", "  ")) and line and not inside:
            yield ""
        yield line[4:] if inside else line.replace("|", "\\|")
    if inside:
        yield "```"


MAKERS: tuple[Callable[[], str], ...] = (options_page, cli_page, api_page, passes_page)
