"""Judgement of each step's loss and gradient norm by the rules of a recipe's `numerics`."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_vita.config import NumericsConfig

Action = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A step's numbers that a rule refuses, and the rule's reaction."""

    reason: str
    action: Action


class Guard:
    """The rules, and the last steps' numbers that a spike is measured by.

    All ranks pass the same numbers, so that all of them judge alike.
    """

    def __init__(self, rules: NumericsConfig) -> None:
        self.rules = rules
        self._losses: deque[float] = deque(maxlen=rules.rolling_interval_length)
        self._grad_norms: deque[float] = deque(maxlen=rules.rolling_interval_length)
        self._skips = 0  # in a row, up to the last step

    @property
    def may_skip(self) -> bool:
        """True if a rule skips steps, which must be judged before the weights change."""
        return "skip" in (self.rules.nonfinite_action, self.rules.spike_action)

    def judge(self, loss: float, grad_norm: float) -> Fault | None:
        """Return what is wrong with a step's numbers, and note them for the steps that follow."""
        fault = self._find(loss, grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            # Spikes too: a level that has risen for good is normal after a while.
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
        if fault is None or fault.action != "skip":
            self._skips = 0
            return fault
        self._skips += 1
        most = self.rules.max_consecutive_skips
        if self._skips > most:
            reason = f"{fault.reason}, after {most} skipped steps (numerics.max_consecutive_skips)"
            return Fault(reason=reason, action="stop")
        return fault

    def _find(self, loss: float, grad_norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = f"loss {loss:g}, gradient norm {grad_norm:g}"
            return Fault(reason=reason, action=self.rules.nonfinite_action)
        if self.rules.spike_action == "none":
            return None
        for name, value, known in (
            ("loss", loss, self._losses),
            ("gradient norm", grad_norm, self._grad_norms),
        ):
            if reason := self._describe_spike(name, value, known):
                return Fault(reason=reason, action=self.rules.spike_action)
        return None

    def _describe_spike(self, name: str, value: float, known: Iterable[float]) -> str:
        """Say by how much a value is above those known; empty if it is no spike."""
        values = np.array(list(known))
        if len(values) < max(2, self.rules.rolling_interval_length // 2):
            return ""
        mean = values.mean()
        limit = mean + self.rules.sigma_factor * values.std()
        if value <= limit:
            return ""
        return (
            f"{name} {value:g}, above {limit:g} (mean {mean:g} of {len(values)} steps and "
            f"{self.rules.sigma_factor:g} standard deviations)"
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to judge as this one would, as plain values."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "skips": self._skips,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over `state` of an earlier start; an empty one is of a run that noted none."""
        self._losses.clear()
        self._losses.extend(state.get("losses", []))
        self._grad_norms.clear()
        self._grad_norms.extend(state.get("grad_norms", []))
        self._skips = state.get("skips", 0)
