"""Gradients of one rank that a test spoils, and what must come of it."""

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita.training.run.run import Run
from megatron_vita.training.run.run_state import finish_param_gather
from megatron_vita.training.step.step import train_step
from tests.functional.layout_worker import my_batches, open_layout

SKIPS: dict[str, Any] = {
    "nonfinite_action": "skip",
    "spike_action": "skip",
    "rolling_interval_length": 4,
    "sigma_factor": 50.0,
}
KINDS: list[dict[str, float]] = [{"value": math.nan}, {"value": math.inf}, {"factor": 1e6}]
"""Fields of `Poison.spoil`: NaN, an infinity, a spike."""


class Poison:
    """Gradients of one rank's runs that are spoilt before they are added up and reduced."""

    def __init__(self, run: Run, *, rank: int) -> None:
        self.spoil()
        if dist.get_rank() == rank:
            for parameter in (p for model in run.unwrapped_models for p in model.parameters()):
                if parameter.requires_grad:
                    parameter.register_hook(self._change)

    def spoil(self, *, value: float | None = None, factor: float = 1.0) -> None:
        """Spoil the steps from now on; without arguments, no longer.

        value: of the first gradient of each parameter; None: it stays.
        factor: all gradients are multiplied by it.
        """
        self._value = value
        self._factor = factor

    def _change(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        # None: layers that compute their weights' gradients in pieces have added them already.
        if gradient is None:
            return None
        changed = gradient * self._factor
        if self._value is not None:
            changed[(0,) * changed.dim()] = self._value
        return changed


def snapshot(run: Run) -> list[torch.Tensor]:
    """Copies of this rank's weights and optimizer state. Collective."""
    finish_param_gather(run)
    found = [p.detach().clone() for model in run.unwrapped_models for p in model.parameters()]
    for part in run.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            # By name: a state that was loaded is in another order.
            found += [torch.as_tensor(value).clone() for _, value in sorted(state.items())]
    return found


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Tell whether all tensors are bit-equal."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def check_skips(fields: dict[str, Any], kinds: list[dict[str, float]]) -> None:
    """Check that all ranks skip the steps in which the last rank's gradients are spoilt."""
    run = open_layout(SKIPS | fields, None)
    poison = Poison(run, rank=dist.get_world_size() - 1)
    for _ in range(2):
        assert not train_step(run, iter(my_batches(run, 0))).skipped
    for kind in kinds:
        before = snapshot(run)
        step = run.step
        poison.spoil(**kind)
        metrics = train_step(run, iter(my_batches(run, 0)))
        poison.spoil()
        assert metrics.skipped
        assert (run.step, run.consumed_packs) == (step + 1, 4 * (step + 1))
        assert equal(before, snapshot(run))
        metrics = train_step(run, iter(my_batches(run, 0)))
        assert not metrics.skipped
        assert math.isfinite(metrics.loss + metrics.grad_norm)
        assert not equal(before, snapshot(run))
