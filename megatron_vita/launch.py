"""Launches training as torchrun does, and names a rank that dies in one line.

python -m megatron_vita.launch [torchrun's options] pretrain_vita.py RECIPE.yaml [group.field=value ...]

torchrun ends with its own traceback below what a rank said; here the rank's line is the last one.
"""

import logging
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_vita.supervise.ranks import describe_restart, noted_checkpoints

LAUNCHER = "torch.distributed.elastic"
logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Run a script on the ranks of this machine and return its exit code."""
    options = run.parse_args(arguments)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(LAUNCHER)]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    with tempfile.TemporaryDirectory(prefix="vita_launch_") as folder:
        options.log_dir = options.log_dir or folder
        try:
            run.run(options)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not Path(failure.error_file).exists():  # the rank could not say why
                restart = describe_restart(noted_checkpoints(Path(options.log_dir)))
                logger.error("rank %d %s; %s", rank, _describe_death(failure), restart)
            return _exit_code(failure.exitcode)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _describe_death(failure: ProcessFailure) -> str:
    if failure.exitcode >= 0:
        return f"ended with exit code {failure.exitcode}"
    hint = ", often for lack of host memory" if -failure.exitcode == signal.SIGKILL else ""
    return f"was killed by {failure.signal_name()}{hint}"


def _exit_code(code: int) -> int:
    """Exit code of a process as a shell gives it: 128 + n for signal n."""
    if code < 0:
        return 128 - code
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
