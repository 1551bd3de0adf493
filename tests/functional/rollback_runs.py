"""Runs of a toy recipe that are rolled back, and runs whose plan never had the packs left out."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita.config import Recipe
from megatron_vita.data.planning.plan import PackPlan, read_plan, write_plan
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.run.run import Run
from tests.functional.poison import Poison, equal, snapshot

SIZE = 4
RULES = {
    "training.train_iters": 6,
    "training.eval_interval": 0,
    "data.num_workers": 0,
    "checkpoint.save_interval": 2,
    "checkpoint.keep": 3,
    "numerics.nonfinite_action": "rollback",
    "numerics.rollback_steps": 2,
}
FAULTY = 5
"""With these rules: rolled back to the checkpoint of step 2, of which step 3 is done again."""
LEFT_OUT = range(12, 20)
"""Packs of steps 4 and 5."""


class Spoils(Callback):
    """Spoils the gradients of a step, at most so many times."""

    def __init__(self, *, step: int, times: int = 1, **spoilt: float) -> None:
        """spoilt: arguments of `Poison.spoil`."""
        self._step = step
        self._left = times
        self._spoilt = spoilt

    def on_start(self, run: Run) -> None:
        """Choose the last rank."""
        self._poison = Poison(run, rank=dist.get_world_size() - 1)

    def before_step(self, run: Run) -> None:
        """Spoil the step if it is the one."""
        self._poison.spoil()
        if run.step + 1 == self._step and self._left:
            self._left -= 1
            self._poison.spoil(**self._spoilt)


class Keeps(Callback):
    """Keeps weights and optimizer of the end, and the packs of each step that counted."""

    def __init__(self) -> None:
        self.end: list[torch.Tensor] = []
        self.packs: dict[int, set[int]] = {}
        self._seen: set[int] = set()

    def before_step(self, run: Run) -> None:
        """Begin to note packs."""
        self._seen = set()

    def on_losses(self, run: Run, losses: torch.Tensor, *, batch: Any, pack: Any) -> None:
        """Note a pack."""
        self._seen.add(batch.pack_id)

    def after_step(self, run: Run, metrics: Any) -> None:
        """Keep the packs of the step."""
        self.packs[run.step] = self._seen

    def on_end(self, run: Run) -> None:
        """Keep what is left."""
        self.end = snapshot(run)


def train_spoilt(recipe: Recipe, *callbacks: Callback, step: int = FAULTY, times: int = 1) -> Keeps:
    """Run a recipe to its end; some times, a gradient of `step` on the last rank is NaN."""
    keeps = Keeps()
    spoils = Spoils(step=step, times=times, value=float("nan"))
    train(recipe, callbacks=[spoils, keeps, *callbacks])
    return keeps


def train_without(recipe: Recipe, folder: Path, left_out: range) -> Keeps:
    """Run a recipe whose plan does not have some packs; nothing is spoilt or saved."""
    plan = folder / "plan"
    if dist.get_rank() == 0:
        shutil.copytree(recipe.data.plan, plan)
        for path in plan.glob("train*.arrow"):
            write_plan(_without(read_plan(path), left_out), path)
    dist.barrier()
    changes = {"data.plan": str(plan), "checkpoint.save": "", "numerics": type(recipe.numerics)()}
    keeps = Keeps()
    train(recipe.replaced(changes), callbacks=[keeps])
    return keeps


def _without(plan: PackPlan, left_out: range) -> PackPlan:
    packs = plan.columns["pack"]
    kept = (packs < left_out.start) | (packs >= left_out.stop)
    columns = {name: column[kept].copy() for name, column in plan.columns.items()}
    columns["pack"][columns["pack"] >= left_out.stop] -= len(left_out)
    return PackPlan(columns, datasets=plan.datasets, stamp=plan.stamp, history=plan.history)


def check_rollback(recipe: Recipe, folder: Path) -> None:
    """Check on each rank that a rolled back run ends as one that never had the packs."""
    spoilt = train_spoilt(recipe.replaced(RULES | {"checkpoint.save": str(folder / "saved")}))
    reference = train_without(recipe.replaced(RULES), folder, LEFT_OUT)
    assert equal(spoilt.end, reference.end)
    seen = set().union(*spoilt.packs.values())
    assert not seen & set(LEFT_OUT)
