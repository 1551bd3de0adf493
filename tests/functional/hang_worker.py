"""Run in every rank: the ranks of a watched run, of which rank 1 hangs in a given way.

Arguments: kind of hang, folder of the run.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.training.callbacks.watching import WatchCallback
from megatron_vita.training.run.run import Run
from tests.functional.hang_kinds import HANG_SECONDS, HANGS


def main() -> None:
    """Go through two steps; rank 1 hangs in the second."""
    kind, folder = sys.argv[1:]
    platform.initialize_process()
    platform.set_up_logging(dist.get_rank())
    recipe = Recipe().replaced({"training.run_dir": folder, "training.hang_seconds": HANG_SECONDS})
    run: Any = Run(recipe=recipe, chunks=[], optimizer=None, schedule=None, microbatches=1)
    run.other_group = dist.new_group([0, 1], group_desc="other")
    watch = WatchCallback()
    watch.on_start(run)
    values = torch.ones(3, 4)
    for step in range(2):
        run.step = step
        watch.before_step(run)
        run.enter("forward", micro_batch=1, keys=[f"key_{dist.get_rank()}_{step}"])
        if step == 1 and dist.get_rank() == 1:
            (Path(folder) / "began").write_text(str(time.time()))
            HANGS[kind].hang(run)
        dist.all_reduce(values)
        time.sleep(0.1)
    watch.on_end(run)
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
