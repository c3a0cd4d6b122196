"""Results of several pairs of releases beside each other: what differs from the newest, what failed, as text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Pair of releases, the newest last -> kind of model -> what `matrix.one` found."""


def differing_operators(found: Mapping[str, int], newest: Mapping[str, int]) -> str:
    """The operators that a capture has more or fewer of than that of the newest release; "" where there are none."""
    changes = {name: found.get(name, 0) - newest.get(name, 0) for name in sorted({*found, *newest})}
    return ", ".join(f"{'+' if count > 0 else '−'}{abs(count)} {name}" for name, count in changes.items() if count)


def differing_lines(found: str, newest: str) -> str:
    """How many lines of a listing are not those of the newest release: "+2−1"; "" where none differ."""
    lines = list(difflib.unified_diff(newest.splitlines(), found.splitlines(), lineterm="", n=0))[2:]
    more, fewer = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return f"+{more}−{fewer}" if lines else ""


def failed(found: Mapping[str, Any]) -> bool:
    return "error" in found or found.get("ok") is False


def table(results: Results) -> str:
    """One line per model, one column per pair of releases, and below what stands in them."""
    rows = [("", *results)]
    for model in _models(results):
        rows.append((model, *(_cell(found.get(model), newest(results, model)) for found in results.values())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:], "", *LEGEND, "", _summary(results)])


LEGEND = (
    "number: the largest deviation of loss, logits, gradients, norm and weights from the dense model in float64; dense: under",
    "a plan that splits nothing, where no policy fits; –: not in this release; FAILED: see below",
    "s: static shapes only   a: attention not as one operator, or not compared with the model   o: other operators than in the",
    "newest release that captures the model   +a−b: lines of the listing that this release alone, or the newest alone, has",
)


def _cell(found: Mapping[str, Any] | None, reference: Mapping[str, Any]) -> str:
    if found is None:
        return ""
    if found.get("absent"):
        return "–"
    if "error" in found:
        return "FAILED"
    deviation = found.get("unverified") or f"{found['deviation']:.0e}" + ("" if found["ok"] else " FAILED")
    plan = "dense" if found.get("policy", "") is None else ""
    return " ".join(filter(None, (deviation, plan, _flags(found, reference), _lines(found, reference))))


def _flags(found: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    other = differing_operators(found["operators"], reference.get("operators", {}))
    given_up = any(not _about_shape(why) for why in found["degraded"])
    return ("s" if found["capture"] == "static" else "") + ("a" if given_up else "") + ("o" if other else "")


def _lines(found: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    if "listing" not in found or "listing" not in reference:
        return ""
    return differing_lines(found["listing"], reference["listing"])


def _summary(results: Results) -> str:
    """How many there are of each outcome."""
    every = [one for found in results.values() for one in found.values()]
    tried = [one for one in every if not one.get("absent")]
    counts = {
        "failed": sum(failed(one) for one in tried),
        "under a plan that splits nothing": sum(one.get("policy", "") is None for one in tried),
        "with static shapes only": sum(one.get("capture") == "static" for one in tried),
        "not in their release": len(every) - len(tried),
    }
    seconds = sum(one.get("seconds", 0) for one in every)
    passed = f"{len(tried) - counts['failed']} of {len(tried)} passed"
    return ", ".join([passed, *(f"{count} {what}" for what, count in counts.items() if count), f"{seconds / 60:.0f} minutes"])


def notes(results: Results) -> str:
    """Below the table: every failure, every model with a single shape, every difference of operators."""
    parts = []
    for title, entries in (
        ("Failed", _failures(results)),
        ("Policies that do not fit the release", _unfit(results)),
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


def _unfit(results: Results) -> Iterator[str]:
    yield from _by_model(results, lambda found, _: "; ".join(found.get("unfit", ())))


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
