"""Damaged checkpoints: each is named, and the whole one before it is loaded."""

import logging
import shutil
from pathlib import Path

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.training.loop import train
from megatron_vita.training.run.resume import ResumePoint
from megatron_vita.training.run.run import Run, open_run
from megatron_vita.training.run.run_state import restore_newest
from tests.faults.rows import Row
from tests.functional.toy_run import make_toy_run
from tests.training.damage import DAMAGE

OVERRIDES = ["data.num_workers=0", "training.eval_interval=0", "training.train_iters=8"]
RULE = "damaged file named, weights and position of the whole checkpoint before it"


class _Lines(logging.Handler):
    """Text in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


def damage_checkpoints(count: int, folder: Path) -> list[Row]:
    """Damage a checkpoint in each way, and resume."""
    platform.initialize_process()
    recipe = make_toy_run(folder / "toy")
    train(load_recipe(recipe, OVERRIDES))
    run = open_run(load_recipe(recipe, OVERRIDES))
    rows: list[Row] = []
    for kind in DAMAGE:
        row = Row(kind=f"damaged checkpoint: {kind}", rule=RULE)
        for number in range(count):
            row.count(_is_survived(run, kind, folder / f"{len(rows)}_{number}"))
        rows.append(row)
    return rows


def _is_survived(run: Run, kind: str, folder: Path) -> bool:
    whole = run.recipe
    shutil.copytree(whole.checkpoint.save, folder)
    run.recipe = whole.replaced({"checkpoint.save": str(folder)})
    name, damage = DAMAGE[kind]
    damage(folder / "step_00000008" / name)
    lines = _Lines()
    # A run that was restored before is at that step already.
    run.step = 0
    run.consumed_packs = 0
    logging.getLogger().addHandler(lines)
    try:
        resumed = restore_newest(run, ResumePoint.find(run.recipe))
    finally:
        logging.getLogger().removeHandler(lines)
        run.recipe = whole
        shutil.rmtree(folder)
    is_named = f"step_00000008/{name}".rstrip("/") in lines.text and "skipped" in lines.text
    is_restored = (run.step, run.consumed_packs) == (4, 16)
    return is_named and is_restored and resumed.checkpoint == folder / "step_00000004"
