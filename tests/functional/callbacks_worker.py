"""Run by torchrun: trains a recipe on two pipeline stages with callbacks that differ by rank; prints
what each rank has found."""

import re
import sys
from typing import Any

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.config import load_recipe
from megatron_vita.errors import VitaError
from megatron_vita.training.callbacks import Callback
from megatron_vita.training.loop import train
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run

FIELDS = [
    "parallel.pipeline_model_parallel_size=2",
    "data.num_workers=0",
    "training.train_iters=3",
    "training.eval_interval=0",
    "checkpoint.save=''",
]


class Records(Callback):
    """Records where losses are, on one rank, and on all."""

    def on_losses(self, run: Run, losses: torch.Tensor, **_: Any) -> None:
        run.record("mine/last_stage", losses.sum() / len(losses), weight=len(losses))
        run.record("mine/losses_on", float(dist.get_rank()), reduce="min")

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        run.record("mine/all", 1, reduce="sum")
        if dist.get_rank() == 0 and run.step == 2:
            run.record("mine/first_rank", 7)

    def on_log(self, run: Run, metrics: StepMetrics) -> None:
        found = dict(metrics.recorded)
        found["mine/last_stage"] = abs(round(found["mine/last_stage"] - metrics.loss, 5))
        say(f"step {run.step} {sorted(found.items())}")


class Fails(Callback):
    """Fails on one rank."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        if dist.get_rank() == 1:
            raise ValueError("on one rank")


class TwoWays(Callback):
    """Reduces one metric in different ways."""

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        run.record("mine/way", 1, reduce="sum" if dist.get_rank() else "max")


def say(text: str) -> None:
    sys.stdout.write(f"rank {dist.get_rank()}: {text}\n")
    sys.stdout.flush()


def main() -> None:
    platform.initialize_process()
    recipe = load_recipe(sys.argv[1], FIELDS)
    train(recipe, callbacks=[Records()])
    uneven = [Records()] * (1 + dist.get_rank())
    for callbacks in ([Fails()], uneven, [TwoWays()]):
        try:
            train(recipe, callbacks=callbacks)
            say("trained on")
        except VitaError as error:
            say(f"{type(error).__name__}: {re.sub(r':[0-9]+[)]', ')', str(error))}")
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
