"""The loss scale of float16: what keeps small gradients from vanishing, lowered when large ones overflow."""

from __future__ import annotations

from typing import Any


class LossScale:
    """A power of two that the loss is multiplied by before a backward and its gradients are divided by after it, which changes
    no bit of them.

    Halved when a step's gradients are not finite, doubled after `interval` good steps in a row. Every rank sees the same
    steps, so that the scale is the same on all of them. For other dtypes than float16 it is 1 and stays so.
    """

    def __init__(self, enabled: bool, initial: float = 2.0**16, interval: int = 2000) -> None:
        self.enabled = enabled
        self.scale = initial if enabled else 1.0
        self.interval = interval
        self.good_steps = 0

    def update(self, skipped: bool) -> None:
        """Called once per optimizer step."""
        if not self.enabled:
            return
        if skipped:
            self.scale, self.good_steps = max(self.scale / 2, 2.0**-24), 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = min(self.scale * 2, 2.0**24), 0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
