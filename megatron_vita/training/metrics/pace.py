"""Remaining time of a run, from a smoothed time of a step and the times of saving and validation."""

import time
from typing import Literal

from megatron_vita.config import Recipe

Part = Literal["step", "save", "validation", "rest"]
SMOOTHING = 0.05
"""Weight of the newest step; about the last 40 steps count."""


class Pace:
    """Division of the time of a run into steps, saving, validation and the rest, without a gap."""

    def __init__(self, recipe: Recipe) -> None:
        self._steps = recipe.training.train_iters
        self._intervals: dict[Part, int] = {
            "save": recipe.checkpoint.save_interval if recipe.checkpoint.save else 0,
            "validation": recipe.training.eval_interval,
        }
        self._marked = time.perf_counter()
        self._seconds: dict[Part, float] = {}  # smoothed
        self._counts: dict[Part, int] = {}
        self._rest = 0.0  # since the last step: what callbacks do besides

    def mark(self, part: Part) -> None:
        """End a part, which began at the mark before."""
        now = time.perf_counter()
        seconds = now - self._marked
        self._marked = now
        if part == "rest":
            self._rest += seconds
            return
        if part == "step":
            seconds += self._rest
            self._rest = 0.0
        self._add(part, seconds)

    def restart(self) -> None:
        """Leave out the time since the last step, as of a rollback, and measure from now on."""
        self._marked = time.perf_counter()
        self._rest = 0.0

    def left(self, step: int) -> float:
        """Seconds from the end of `step`, whose own saving and validation are still to come."""
        seconds = (self._steps - step) * self._seconds.get("step", 0.0)
        for part in self._intervals:
            seconds += self._due(part, step) * self._seconds.get(part, 0.0)
        return seconds

    def _add(self, part: Part, seconds: float) -> None:
        count = self._counts.get(part, 0)
        self._counts[part] = count + 1
        if part == "step" and count <= 1:
            self._seconds[part] = seconds  # the first step, which warms up, counts until the second
            return
        weight = max(SMOOTHING, 1 / max(count, 1)) if part == "step" else 1 / (count + 1)
        known = self._seconds.get(part, 0.0)
        self._seconds[part] = known + weight * (seconds - known)

    def _due(self, part: Part, step: int) -> int:
        """Count how often a part runs after `step`, including once at the end of the run."""
        interval = self._intervals[part]
        if not interval:
            return 0
        regular = self._steps // interval - (step - 1) // interval
        return regular + bool(self._steps % interval)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
