"""Launch training as torchrun does, and report a rank that dies in one line.

    python -m megatron_vita.launch [torchrun's options] pretrain_vita.py RECIPE.yaml
        [group.field=value ...]

torchrun prints its own traceback below a rank's last line; here the rank's line is the last one.
torchrun kills ranks 30 seconds after Ctrl-C or SIGTERM; here they may finish their step and save.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_vita.supervise.last_words import read_last_words
from megatron_vita.supervise.rank_failure import describe_restart, noted_checkpoints

LAUNCHER = "torch.distributed.elastic"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask ranks to save and end."""
REPEAT_SECONDS = 0.2
"""Interrupts within this time count as one: a terminal and a supervisor may both send the same."""
logger = logging.getLogger(__name__)


class SignalForwarder:
    """Handler that passes signals on to the ranks of this machine, and waits for them to end.

    A second Ctrl-C kills them.
    """

    def __init__(self) -> None:
        self.received = 0  # the first signal
        self.has_killed = False
        self._received_at = 0.0

    def install(self, options: Namespace) -> None:
        """Take over signals from torchrun, unless it restarts ranks that end: it would restart those
        that were told to stop."""
        if options.max_restarts:
            return
        names = {number.name for number in FORWARDED}
        kept = [name for name in options.signals_to_handle.split(",") if name.strip() not in names]
        options.signals_to_handle = ",".join(kept)
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            raise SignalException("there are no ranks yet", sigval=signal.Signals(number))
        now = time.monotonic()
        if number == signal.SIGINT and self.received:
            if now - self._received_at < REPEAT_SECONDS:
                return
            self.has_killed = True
            number = signal.SIGKILL
        if not self.received:
            self.received = number
            self._received_at = now
        for rank in ranks:
            # A rank that has ended meanwhile needs no signal.
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


def main(arguments: list[str]) -> int:
    """Run a script on the ranks of this machine and return its exit code."""
    options = run.parse_args(arguments)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHER)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    signals = SignalForwarder()
    signals.install(options)
    if ":" in str(options.nnodes):
        # By default all rendezvous use the store of the first one's rank 0, whose machine may be
        # lost.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="vita_launch_") as folder:
        options.log_dir = options.log_dir or folder
        try:
            run.run(options)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not Path(failure.error_file).exists():  # the rank could not report why
                restart = describe_restart(noted_checkpoints(Path(options.log_dir)))
                reason = f"rank {rank} {_describe_death(failure, logs=Path(options.log_dir))}"
                if signals.has_killed:
                    reason = "interrupted again: stopped at once, without saving"
                logger.error("%s; %s", reason, restart)
            return _exit_code(-signals.received or failure.exitcode)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _describe_death(failure: ProcessFailure, *, logs: Path) -> str:
    death = f"ended with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        death = f"was killed by {failure.signal_name()}"
    if -failure.exitcode == signal.SIGKILL:
        death += " (often for lack of host memory)"
    return death + read_last_words(logs, local_rank=failure.local_rank)


def _exit_code(code: int) -> int:
    """Exit code of a process as a shell gives it: 128 + n for signal n."""
    if code < 0:
        return 128 - code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
