"""Results of several pairs of releases beside each other: what differs from the newest, what failed, as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Pair of releases, the newest last -> kind of model -> what `matrix.one` found."""

_HEAD = ("transformers", "model", "capture", "verify", "operators", "listing", "s")


def differing_operators(found: Mapping[str, int], newest: Mapping[str, int]) -> str:
    """The operators that a capture has more or fewer of than that of the newest release; "" where there are none."""
    changes = {name: found.get(name, 0) - newest.get(name, 0) for name in sorted({*found, *newest})}
    return ", ".join(f"{'+' if count > 0 else '−'}{abs(count)} {name}" for name, count in changes.items() if count)


def differing_lines(found: str, newest: str) -> str:
    """How many lines of a listing are not those of the newest release: "+2 −1"; "" where none differ."""
    lines = list(difflib.unified_diff(newest.splitlines(), found.splitlines(), lineterm="", n=0))[2:]
    more, fewer = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return f"+{more} −{fewer}" if lines else ""


def failed(found: Mapping[str, Any]) -> bool:
    return "error" in found or found.get("ok") is False


def table(results: Results) -> str:
    """One line per model and pair of releases."""
    rows = [_HEAD, *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _rows(results: Results) -> Iterator[tuple[str, ...]]:
    for model in _models(results):
        for pair in results:
            found = results[pair].get(model)
            if found is not None:
                yield pair, model, *_cells(found, newest(results, model)), f"{found.get('seconds', 0):.0f}"


def _cells(found: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if found.get("absent"):
        return "not in this release", "", "", ""
    if "error" in found:
        return "FAILED", "", "", ""
    capture = found["capture"] + (", degraded" if any(not _about_shape(why) for why in found["degraded"]) else "")
    verify = found.get("unverified") or f"{found['deviation']:.1e}" + ("" if found["ok"] else " FAILED")
    if found is reference:
        return capture, verify, "newest", "newest" if "listing" in found else "none"
    operators = "differ" if differing_operators(found["operators"], reference.get("operators", {})) else "same"
    if "listing" not in found or "listing" not in reference:
        return capture, verify, operators, "none"
    return capture, verify, operators, differing_lines(found["listing"], reference["listing"]) or "same"


def notes(results: Results) -> str:
    """Below the table: every failure, every model with a single shape, every difference of operators."""
    parts = []
    for title, entries in (
        ("Failed", _failures(results)),
        ("Static shapes only: captured again for every shape", _static(results)),
        ("Not as one attention operator, or not compared with the model", _degraded(results)),
        ("Operators that the newest release does not have (+) or has more of (−)", _operators(results)),
    ):
        lines = [f"  {entry}" for entry in entries]
        if lines:
            parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def newest(results: Results, model: str) -> Mapping[str, Any]:
    """What the newest release that captures a model gives."""
    captured = [found[model] for found in results.values() if "capture" in found.get(model, {})]
    return captured[-1] if captured else {}


def _models(results: Results) -> list[str]:
    return list(dict.fromkeys(model for found in results.values() for model in found))


def _failures(results: Results) -> Iterator[str]:
    for pair, models in results.items():
        for model, found in models.items():
            if "error" in found:
                yield f"{pair} {model}: {found['error']}"
            elif failed(found):
                worst = found["worst"]
                off = f"{worst['value']:.1e}, of {worst['tolerance']:.0e} allowed"
                yield f"{pair} {model}: {worst['quantity']} {worst['parameter']} is off by {off}".replace("  ", " ")


def _about_shape(why: str) -> bool:
    return why.startswith("shape: ")


def _static(results: Results) -> Iterator[str]:
    yield from _by_model(results, lambda found, _: "single shape" if found.get("capture") == "static" else "", name=False)


def _degraded(results: Results) -> Iterator[str]:
    yield from _by_model(results, lambda found, _: "; ".join(why for why in found.get("degraded", ()) if not _about_shape(why)))


def _operators(results: Results) -> Iterator[str]:
    def change(found: Mapping[str, Any], model: str) -> str:
        return differing_operators(found["operators"], newest(results, model)["operators"]) if "operators" in found else ""

    yield from _by_model(results, change)


def _by_model(results: Results, say: Any, name: bool = True) -> Iterator[str]:
    """What there is to say about each model, once for all the releases it is true of."""
    for model in _models(results):
        said: dict[str, list[str]] = {}
        for pair, models in results.items():
            if what := say(models.get(model, {}), model):
                said.setdefault(what, []).append(pair)
        for what, pairs in said.items():
            yield f"{model} ({', '.join(pairs)})" + (f": {what}" if name else "")
