"""The loss of a run as an SVG, from its log. It needs no library, and every browser shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, MARGIN = 720, 360, 64, 32
"""Of the picture, in pixels; the margin is that of the other three sides."""
POINTS = 1000
"""Points of a line, at most: of more steps, each point is a mean."""


def read_losses(log: Path) -> dict[int, float]:
    """Step -> loss. Of two lines for a step, in a run that was resumed, the later one counts."""
    losses: dict[int, float] = {}
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
        if math.isfinite(entry.get("loss", math.nan)):
            losses[entry["step"]] = entry["loss"]
    return dict(sorted(losses.items()))


def write_chart(log: Path, chart: Path, title: str) -> bool:
    """Draw the losses that `log` holds. Returns whether there were any."""
    losses = read_losses(log)
    if not losses:
        return False
    chart.write_text(draw(losses, title))
    return True


def draw(losses: dict[int, float], title: str) -> str:
    """An SVG of step -> loss."""
    size = math.ceil(len(losses) / POINTS)
    steps, values = list(losses), list(losses.values())
    groups = [slice(first, first + size) for first in range(0, len(steps), size)]
    points = [(sum(steps[g]) / len(steps[g]), sum(values[g]) / len(values[g])) for g in groups]
    low, high = min(values), max(values)
    ticks = nice_ticks(low, high if high > low else low + 1)
    low, high = min(ticks[0], low), max(ticks[-1], high)
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    span = max(steps[-1] - steps[0], 1)

    def x(step: float) -> float:
        return LEFT + (step - steps[0]) / span * (right - LEFT)

    def y(loss: float) -> float:
        return bottom - (loss - low) / (high - low) * (bottom - MARGIN)

    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20">{title.replace("&", "&amp;").replace("<", "&lt;")}</text>',
    ]
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">step {steps[0]}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 10}" text-anchor="end">step {steps[-1]}</text>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five of them, from below `low` to above `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * unit, 12) for number in range(math.floor(low / unit), math.ceil(high / unit) + 1)]
