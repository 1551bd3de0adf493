"""Cost of hooks: the share of a step that logging, metrics and callbacks take.

torchrun --standalone --nproc_per_node 2 benchmarks/callbacks.py FOLDER RECIPE.yaml [group.field=value ...]

Runs the recipe's steps with everything that logs (overrides may add W&B and MLflow), in FOLDER, and with
a callback that records two metrics. Validation and saving are off: what they do is no logging. Both shares count
the time of one rank in the outermost hooks: of the clock, and of the processor time of the thread that
trains, in which neither other programs nor waiting for packs and other ranks count.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe, load_recipe
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.hooks import Hooks
from megatron_vita.training.run.run import Run

WARM_UP = 10
"""Steps that are not counted."""


@dataclass
class Clock:
    """Seconds by the clock, and of this thread's processor time."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> "Clock":
        """Both clocks."""
        return cls(time.perf_counter(), time.thread_time())

    def add(self, since: "Clock") -> None:
        """Add the time that has passed."""
        self.wall += time.perf_counter() - since.wall
        self.cpu += time.thread_time() - since.cpu


@dataclass
class HookTimer:
    """Time in hooks of the steps after the warm-up."""

    steps: int = 0
    hooks: Clock = field(default_factory=Clock)
    total: Clock = field(default_factory=Clock)
    _depth: int = 0
    _began: Clock = field(default_factory=Clock)

    def install(self) -> None:
        """Measure every call of hooks from now on."""
        call = Hooks.call

        def timed(hooks: Hooks, hook: str, *arguments: Any, **keywords: Any) -> None:
            if hook == "before_step":
                self._begin_step()
            began = Clock.now()
            self._depth += 1
            call(hooks, hook, *arguments, **keywords)
            self._depth -= 1
            # Hooks that write are called from within others.
            if self._depth == 0 and self.steps > WARM_UP:
                self.hooks.add(began)

        Hooks.call = timed  # type: ignore[method-assign]

    def _begin_step(self) -> None:
        if self.steps > WARM_UP:
            self.total.add(self._began)
        self.steps += 1
        self._began = Clock.now()


class Records(Callback):
    """Records a metric of each pack and one of each step, as a user's callback may."""

    def on_losses(self, run: Run, losses: torch.Tensor, **_: Any) -> None:
        """Record the mean loss of a pack."""
        run.record("benchmark/loss", losses.mean(), weight=len(losses))

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Record the most tokens of a step."""
        run.record("benchmark/tokens", metrics.tokens, reduce="max")


def with_logs(recipe: Recipe, folder: str) -> Recipe:
    """Replace the places of a recipe's logs, and turn off validation and saving."""
    return recipe.replaced(
        {
            "training.run_dir": folder,
            "training.tensorboard_dir": str(Path(folder, "tensorboard")),
            "training.eval_interval": 0,
            "checkpoint.save": "",
        }
    )


def main(arguments: list[str]) -> None:
    """Measure, and print the shares of rank 0."""
    timer = HookTimer()
    timer.install()
    folder, recipe, *overrides = arguments
    train(with_logs(load_recipe(recipe, overrides), folder), callbacks=[Records()])
    rank = dist.get_rank()
    platform.destroy_process_group()
    if rank == 0:
        counted = timer.steps - WARM_UP - 1
        for name in ("wall", "cpu"):
            hooks = getattr(timer.hooks, name)
            total = getattr(timer.total, name)
            sys.stdout.write(
                f"{name}: {1000 * total / counted:.2f} ms a step, {1000 * hooks / counted:.3f} ms in "
                f"hooks: {hooks / total:.2%} ({counted} steps)\n"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
