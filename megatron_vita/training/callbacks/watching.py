"""Watch for hangs: a process beside the first rank receives heartbeats from all ranks."""

import json
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

import megatron_vita
from megatron_vita import platform
from megatron_vita.config.run_files import run_folder
from megatron_vita.errors import PlatformError
from megatron_vita.parallel import groups
from megatron_vita.supervise.beacon import Beacon
from megatron_vita.training.metrics.metrics import StepMetrics
from megatron_vita.training.run.callback import Callback
from megatron_vita.training.run.run import Run
from megatron_vita.training.run.streams import packs_of_replicas
from megatron_vita.training.step.batches import held_out_packs

MOST_SECONDS = 2.0
"""Maximum time between two messages of a rank."""
logger = logging.getLogger(__name__)


class WatchCallback(Callback):
    """Report of a hang by `training.hang_seconds`: which rank, where, with which samples."""

    collective = True

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[str] | None = None

    def on_start(self, run: Run) -> None:
        """Start the watcher on the first rank, and connect every rank to it. Collective."""
        place: list[tuple[str, int, str]] = [("", 0, "")]
        if dist.get_rank() == 0:
            place = [self._start_watcher(run)]
        dist.broadcast_object_list(place, src=0)
        host, port, token = place[0]
        if not port:
            raise PlatformError(
                "the process that watches for hangs does not start; its error is above, and "
                "training.hang_seconds 0 runs without it"
            )
        timeout = run.recipe.training.hang_seconds
        try:
            run.beacon = Beacon(
                dist.get_rank(),
                address=(host, port),
                token=token,
                interval=min(timeout / 10, MOST_SECONDS),
                timeout=timeout,
                pending=platform.pending_collectives,
                awaited=lambda number, held_out: awaited_samples(run, number, held_out=held_out),
            )
        # Such as a firewall's, which is no reason to end the run.
        except OSError as error:
            logger.warning(
                "rank %d is not watched for hangs: %s:%d: %s", dist.get_rank(), host, port, error
            )

    def before_step(self, run: Run) -> None:
        """Note the step."""
        run.enter("loading", step=run.step + 1)

    def after_step(self, run: Run, metrics: StepMetrics) -> None:
        """Note that the step is done."""
        run.enter("callbacks")

    def on_end(self, run: Run) -> None:
        """Disconnect from the watcher, and end it."""
        if run.beacon is not None:
            run.beacon.close()
            run.beacon = None
        if self._watcher is not None:
            # Closing its stdin would not end it: a forked writer of checkpoints has the pipe, too.
            self._watcher.kill()
            self._watcher.wait()

    def _start_watcher(self, run: Run) -> tuple[str, int, str]:
        """Return host, port and token of the watcher; port 0 if it does not start."""
        folder = run_folder(run.recipe)
        token = secrets.token_hex(16)
        is_one_host = os.environ.get("LOCAL_WORLD_SIZE", "1") == str(dist.get_world_size())
        settings = {
            "timeout": run.recipe.training.hang_seconds,
            "token": token,
            "folder": str(Path(folder).absolute()) if folder else "",
            "is_one_host": is_one_host,
        }
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "megatron_vita.supervise.watcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": _python_path()},
            # A signal to the rank's process group, such as Ctrl-C, is not for the watcher.
            start_new_session=True,
        )
        assert self._watcher.stdin
        assert self._watcher.stdout
        self._watcher.stdin.write(json.dumps(settings) + "\n")
        self._watcher.stdin.flush()
        port = int(self._watcher.stdout.readline() or 0)
        # The host of the rendezvous: every rank has reached it already.
        host = "127.0.0.1" if is_one_host else os.environ["MASTER_ADDR"]
        return host, port, token


def awaited_samples(run: Run, number: int, *, held_out: bool) -> list[str]:
    """Return the samples of this replica's pack `number` of the step, or of the validation, from
    1."""
    if held_out and run.validation_stream is not None:
        return run.validation_stream.keys_of(held_out_packs(run)[number - 1])
    if run.train_stream is None:
        return []
    group = groups.data_parallel_group()
    packs = packs_of_replicas(
        run.recipe, run.train_stream.plan, first=run.next_pack, replicas=group.size()
    )
    return run.train_stream.keys_of(packs[group.rank()][number - 1])


def _python_path() -> str:
    """Search path of a process that finds this package, wherever it was imported from."""
    root = str(Path(megatron_vita.__file__).parents[1])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
