"""Run in every rank: trains a recipe, records each step, and has faults at given places.

Arguments: recipe, file for the records, fields of each `Fault` as JSON, overrides.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.checkpoint import saver
from megatron_vita.checkpoint.mirror import Mirror
from megatron_vita.checkpoint.saver import Saver
from megatron_vita.checkpoint.writing import Share
from megatron_vita.config import load_recipe
from megatron_vita.data.batch import Batch
from megatron_vita.training import loop
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.run import Run
from tests.functional.recorded import kill_all, record_steps, use_small_buckets

use_small_buckets()


@dataclass(kw_only=True)
class Fault:
    """A SIGKILL.

    place: where it happens.
    step: step from which on it may.
    victim: rank that is killed; -1: all ranks and their launcher.
    delay: seconds from the place to the kill.
    """

    place: str
    step: int
    victim: int
    delay: float

    def strike(self) -> None:
        """Kill, if it is this rank's to do."""
        if self.victim < 0 and dist.get_rank() == 0:
            kill_all(psutil.Process())
        elif self.victim == dist.get_rank():
            psutil.Process().kill()

    def strike_later(self) -> None:
        """Kill after the delay, whatever the rank does then."""
        timer = threading.Timer(self.delay, self.strike)
        timer.daemon = True
        timer.start()


def before_step(step: int, action: Callable[[], None]) -> None:
    """Have a step preceded by an action."""
    train_step = loop.train_step

    def preceded(run: Run, batches: Iterator[Batch]) -> StepMetrics:
        if run.step + 1 == step:
            action()
        return train_step(run, batches)

    loop.train_step = preceded


def in_step(fault: Fault) -> None:
    """Kill in forward, backward, or whatever follows in the delay."""
    before_step(fault.step, fault.strike_later)


def in_save(fault: Fault) -> None:
    """Kill while the writers of the next checkpoint write."""
    start = Saver.start
    write_item = Share._write_item

    def slow(*args: Any, **keywords: Any) -> None:
        time.sleep(0.002)
        write_item(*args, **keywords)

    def start_and_die(self: Saver, *, step: int, **state: Any) -> None:
        start(self, step=step, **state)
        if step >= fault.step:
            fault.strike_later()

    Share._write_item = slow  # type: ignore[method-assign]
    Saver.start = start_and_die  # type: ignore[method-assign]


def in_rename(fault: Fault) -> None:
    """Kill before or after the next checkpoint gets its name; `latest` names the one before it."""
    publish = saver.publish

    def publish_and_die(source: Path, target: Path) -> None:
        is_due = int(target.name.removeprefix("step_")) >= fault.step
        if is_due and fault.delay < 0.1:
            fault.strike()
        publish(source, target)
        if is_due:
            fault.strike()

    saver.publish = publish_and_die


def in_upload(fault: Fault) -> None:
    """Kill the first rank, or all, while a process of it uploads."""
    put_file = Mirror._put_file

    def put_and_die(self: Mirror, path: Path, name: str, **keywords: Any) -> None:
        put_file(self, path, name, **keywords)
        if int(name.split("/")[0].removeprefix("step_")) < fault.step:
            return
        rank = psutil.Process(os.getppid())
        if fault.victim < 0:
            kill_all(rank)
        rank.kill()

    Mirror._put_file = put_and_die  # type: ignore[method-assign]


def in_loader(fault: Fault) -> None:
    """Kill the loader processes of a rank, or of all; the run itself goes on."""

    def kill_readers() -> None:
        if fault.victim not in (-1, dist.get_rank()):
            return
        # They are the children of a fork server; its own death costs no more.
        children = psutil.Process().children(recursive=True)
        loaders = [child for child in children if child.ppid() != os.getpid()]
        assert loaders, "there is no loader process to kill"
        for loader in loaders:
            loader.kill()

    before_step(fault.step, kill_readers)


PLACES = {
    "step": in_step,
    "save": in_save,
    "rename": in_rename,
    "upload": in_upload,
    "loader": in_loader,
}


def main() -> None:
    """Train with the faults."""
    recipe, records, faults, *overrides = sys.argv[1:]
    record_steps(records)
    for fields in json.loads(faults):
        PLACES[fields["place"]](Fault(**fields))
    loop.train(load_recipe(recipe, overrides))
    platform.destroy_process_group()


if __name__ == "__main__":
    main()
