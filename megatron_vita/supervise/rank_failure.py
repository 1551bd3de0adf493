"""End of a rank that fails: one line from one rank of a machine, which torchrun repeats.

torchrun gives each rank a file for its error, TORCHELASTIC_ERROR_FILE, in a folder of its own; the
folders of a machine's ranks lie in one. The first rank that fails creates a file there, the mark.
It alone reports why, and ends with exit code 1. Ranks that fail after it, mostly because it is
gone, end silently, with exit code 0: torchrun would show a block of lines for any other.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron_vita.errors import VitaError
from megatron_vita.supervise.last_words import ERROR_FILE

MARK = "failed"
HUNG = 75
"""Exit code of a job that hangs; sysexits.h has it for failures that may pass (EX_TEMPFAIL)."""
NOTE = "checkpoints"
LAUNCHER_SECONDS = 10.0
"""Time for a launcher to notice that another rank has died, and to end the rest."""
FIRST_SECONDS = 0.5
"""Time for the machine's first rank to report an error that all ranks have."""
OTHERS_SECONDS = 1.0
"""Time for the machine's other ranks to end after the one that reports."""
LOG_SECONDS = 2.0
"""Time for a hanging rank to write its last log line."""
LOST_PEER = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
)
"""Parts of the messages of collectives, and of waits at the store, whose peer is gone."""
logger = logging.getLogger(__name__)


def report_failure(error: BaseException, *, checkpoints: str | None = None) -> int:
    """Report in one line why this rank ends, and return its exit code.

    If another rank of this machine has reported already, this one ends at once instead.

    checkpoints: folder that the run saves to, so that the line tells where the same command
        resumes; None where nothing was trained.
    """
    is_told_to_end = False
    if ERROR_FILE in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending
        if _has_lost_peer(error):
            is_told_to_end = _wait_for_cause()
        elif os.environ.get("LOCAL_RANK") != "0":
            _wait_until(_has_failed, seconds=FIRST_SECONDS)  # the first rank logs, mostly
    if not _leave_mark(MARK):
        # Tells the first rank that this one has ended by itself.
        _leave_mark(f"{MARK}.{os.getpid()}")
        _end_silently()
    # A traceback helps only where the error is ours; a lost peer is a consequence of another error.
    if not isinstance(error, VitaError | KeyboardInterrupt) and not _has_lost_peer(error):
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
    line = describe_failure(error, checkpoints=checkpoints)
    logger.error("%s", line)
    if is_told_to_end:
        _end_silently()
    _write_error_file(line)
    _wait_until(_have_others_ended, seconds=OTHERS_SECONDS)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def end_hung(line: str, *, others: Sequence[int] = ()) -> NoReturn:
    """End this rank from any thread, because its job hangs; one rank of each machine reports it.

    The exit code is HUNG, so that a launcher can tell it from an error that would recur.

    others: process ids of ranks that cannot end by themselves, which are killed.
    """
    is_first = _leave_mark(MARK)
    code = HUNG if is_first or ERROR_FILE not in os.environ else 0
    if is_first:
        # As the first failure of all: torchrun takes the oldest, and a killed rank has no file.
        _write_error_file(line, timestamp=0)
        # The log may be on the file system that hangs.
        end = threading.Timer(LOG_SECONDS, os._exit, (code,))
        end.daemon = True
        end.start()
        logger.error("%s", line)
        sys.stdout.flush()
        sys.stderr.flush()
    # Last, since a launcher takes the first rank that ends for the cause.
    for pid in others:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def describe_failure(error: BaseException, *, checkpoints: str | None = None) -> str:
    """Describe in one line why a rank ends, and, unless it is a user's error, where the same command
    resumes."""
    if isinstance(error, VitaError):
        return _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        reason = "interrupted"
    elif _has_lost_peer(error):
        reason = f"another rank has died, which the launcher names: {_one_line(error)}"
    else:
        reason = f"{type(error).__name__}: {_one_line(error)}"
    line = f"rank {os.environ.get('RANK', '0')}: {reason}"
    if checkpoints is None:
        return line
    return f"{line}; {describe_restart(checkpoints)}"


def describe_restart(checkpoints: str) -> str:
    """Describe where a run that saves to the folder `checkpoints` resumes when started again."""
    if not checkpoints:
        return "the same command starts from the beginning: checkpoint.save is empty"
    try:
        newest = (Path(checkpoints) / "latest").read_text().strip()
    except OSError:  # also where the folder is not there yet
        return f"the same command starts from the beginning: {checkpoints} has no checkpoint"
    return f"the same command resumes from {Path(checkpoints) / newest}"


def note_checkpoints(folder: str) -> None:
    """Record the folder that this run saves to, for the launcher's report of a killed rank."""
    file = os.environ.get(ERROR_FILE)
    if file and folder and os.environ.get("LOCAL_RANK") == "0":
        _write(Path(file).parent.parent / NOTE, str(Path(folder).absolute()))


def noted_checkpoints(logs: Path) -> str:
    """Return the folder of checkpoints that ranks have recorded in a launcher's folder; empty if
    none has."""
    notes = sorted(logs.rglob(NOTE), key=lambda note: note.stat().st_mtime_ns)
    if notes:
        return notes[-1].read_text()
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _has_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def _leave_mark(name: str) -> bool:
    """Create a file that the ranks of this machine see; return false if it exists."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return True
    try:
        (Path(file).parent.parent / name).touch(exist_ok=False)
    # The file system decides the race: only one rank can create the file.
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _marks() -> list[str]:
    """Return the names of the marks of this machine's ranks; none without torchrun."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return []
    return [path.name for path in Path(file).parent.parent.glob(f"{MARK}*")]


def _has_failed() -> bool:
    """Return true if a rank of this machine has reported why it ends."""
    return MARK in _marks()


def _have_others_ended() -> bool:
    """Return true if all other ranks of this machine have failed too.

    torchrun shows a block of lines for each rank that it has to end.
    """
    return len(_marks()) >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _wait_for_cause() -> bool:
    """Wait, after the loss of a peer, until its rank has reported why or torchrun ends this one.

    torchrun takes the first rank that ends for the cause. Returns true if it ends this one.
    """
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    _wait_until(lambda: terminated.is_set() or _has_failed(), seconds=LAUNCHER_SECONDS)
    return terminated.is_set()


def _wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not condition():
        time.sleep(0.02)


def _end_silently() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what is left of the process group cannot be left in order


def _write_error_file(line: str, *, timestamp: int | None = None) -> None:
    """Write a line where torchrun reads tracebacks; `timestamp` None is the current time."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return
    if timestamp is None:
        timestamp = int(time.time())
    where = {"py_callstack": line, "timestamp": str(timestamp)}
    _write(Path(file), json.dumps({"message": {"message": line, "extraInfo": where}}))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", file, error)
