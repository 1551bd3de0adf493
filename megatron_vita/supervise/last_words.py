"""Last words of a rank: files that it keeps for its launcher to read when it is killed or crashes.

torchrun gives each rank a folder, that of TORCHELASTIC_ERROR_FILE. A rank that dies of a signal cannot
say why, so that its place in the run, its last line of log and the Python frame of a crash lie there.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
from pathlib import Path
from typing import IO

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
LINE = "last_line"
CRASH = "crash"
STATE = "state"
MOST = 300
"""Characters that are quoted of a line."""
# As faulthandler writes the innermost frame of the thread that crashed.
_FRAME = re.compile(r'Current thread.*\n  File "(.+)", line (\d+) in (.+)')
_crash_file: IO[str] | None = None  # faulthandler needs it to stay open


class _LastLine(logging.Handler):
    """Keeps the last line of this process's log in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        self._file = _open(path)
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Replace the line; it survives the process as soon as it is written."""
        if os.getpid() != self._process:  # one that the rank has forked
            return
        try:
            line = " ".join(self.format(record).split()).encode(errors="replace")
        except Exception:  # arguments that do not fit the message
            self.handleError(record)
            return
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line, 0)
            os.truncate(self._file, len(line))


def keep_last_words() -> None:
    """Keep the last line of this rank's log, and the stacks of a crash; nothing without a launcher.

    To be called each time after logging is set up, which removes earlier handlers.
    """
    folder = _own_folder()
    if folder is None:
        return
    # A full disk must not end a run that needs these files only if it dies.
    with contextlib.suppress(OSError):
        logging.getLogger().addHandler(_LastLine(folder / LINE))
        _keep_crash(folder / CRASH)


def _keep_crash(path: Path) -> None:
    global _crash_file
    # Where somebody asked for stacks, as by PYTHONFAULTHANDLER, they stay where they are wanted.
    if _crash_file is None and not faulthandler.is_enabled():
        _crash_file = path.open("w")
        faulthandler.enable(_crash_file)
        # The crash of a forked loader is not the rank's.
        os.register_at_fork(after_in_child=faulthandler.disable)


def open_state_file() -> int:
    """Open a file for the state of this rank; without a launcher, one in memory.

    Returns:
        A file descriptor.
    """
    folder = _own_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            return _open(folder / STATE)
    return os.memfd_create(STATE, os.MFD_CLOEXEC)


def read_last_words(logs: Path, *, local_rank: int) -> str:
    """Describe where a rank was when it died, and its last line; "" if it kept none.

    The text continues "rank 1 was killed by SIGKILL". `logs` is the launcher's folder, in which each
    attempt has a folder for each rank of this machine.
    """
    folders = list(logs.rglob(f"attempt_*/{local_rank}"))
    if not folders:
        return ""
    newest = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
    return _place(newest) + _frame(newest) + _line(newest)


def _own_folder() -> Path | None:
    file = os.environ.get(ERROR_FILE)
    return Path(file).parent if file else None


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the rank did not get that far
        return ""


def _place(folder: Path) -> str:
    try:
        # What follows the first line is left of longer states.
        state = json.loads(_read(folder / STATE).partition("\n")[0])
        if not state["step"]:
            return " before its first step"
        return f" in step {state['step']}, {state['phase']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _frame(folder: Path) -> str:
    found = _FRAME.search(_read(folder / CRASH))
    if not found:
        return ""
    file, number, function = found.groups()
    return f" at {function} ({'/'.join(Path(file).parts[-2:])}:{number})"


def _line(folder: Path) -> str:
    line = _read(folder / LINE)
    if not line:
        return ""
    return f"; its last line: {line[:MOST]}"
