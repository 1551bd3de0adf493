"""The state of a rank, sent to the watcher of its job by a thread, whatever the rank waits for.

The channel is a TCP connection of its own: a collective that hangs does not touch it. Messages are
lines of JSON. A rank sends its state; the watcher answers, and may ask where the rank is, about a
process of the rank's host, or that it ends.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_vita.supervise.ranks import end_hung

Phase = Literal[
    "starting", "loading", "forward", "backward", "optimizer", "metrics", "validation", "saving",
    "callbacks",
]  # fmt: skip
STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks to its stack file, also while native code holds the interpreter."""
FRAMES = 4
"""Innermost frames of the main thread that are told in one line."""
MOST_KEYS = 100
_PROC = Path("/proc")


class Beacon:
    """This rank's state, and the thread that sends it.

    Args:
        rank: number of this rank.
        address: host and port of the watcher.
        token: word that the watcher expects.
        interval: seconds between two messages.
        patience: seconds without an answer after which the watcher counts as lost, and the rank
            ends.
        pending: returns descriptions of the collectives that this rank waits for.
    """

    def __init__(
        self,
        rank: int,
        *,
        address: tuple[str, int],
        token: str,
        interval: float,
        patience: float,
        pending: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        self._rank = rank
        self._interval = interval
        self._patience = patience
        self._pending = pending
        self._state: dict[str, Any] = {"step": 0, "micro_batch": 0, "phase": "starting", "keys": []}
        self._changed = time.monotonic()
        self._main = threading.main_thread().ident
        # Without a name: nothing is left of it, however the rank ends.
        self._stacks = os.memfd_create("stacks", os.MFD_CLOEXEC)
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        hello = {"rank": rank, "token": token, "host": socket.gethostname(), "pid": os.getpid()}
        self._hello = hello | {"stack_file": f"/proc/{os.getpid()}/fd/{self._stacks}"}
        self._closed = threading.Event()
        self._socket = socket.create_connection(address, timeout=patience)
        self._thread = threading.Thread(target=self._run, name="beacon", daemon=True)
        self._thread.start()

    def enter(
        self,
        phase: Phase,
        *,
        step: int | None = None,
        micro_batch: int | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        """Note what the rank does from now on; what is not given stays.

        Args:
            phase: part of the step.
            step: number of the step, from 1.
            micro_batch: number of the pack in the step, from 1.
            keys: samples of the pack.
        """
        state = dict(self._state, phase=phase)
        if step is not None:
            state |= {"step": step, "micro_batch": 0, "keys": []}
        if micro_batch is not None:
            state |= {"micro_batch": micro_batch, "keys": []}
        if keys is not None:
            state["keys"] = keys
        # One assignment: the thread never sees half of a state.
        self._state = state
        self._changed = time.monotonic()

    def close(self) -> None:
        """Take leave of the watcher, and end the thread."""
        self._closed.set()
        self._thread.join(self._interval + 1)
        with contextlib.suppress(OSError):
            self._socket.close()
        faulthandler.unregister(STACK_SIGNAL)
        os.close(self._stacks)

    def _run(self) -> None:
        try:
            with self._socket.makefile("rwb") as stream:
                _send(stream, self._hello)
                while not self._closed.is_set():
                    _send(stream, {"state": self._describe()})
                    self._answer(stream)
                    self._closed.wait(self._interval)
                _send(stream, {"bye": True})
        except (OSError, ValueError) as error:
            if not self._closed.is_set():
                self._end_unwatched(error)

    def _answer(self, stream: Any) -> None:
        """Do what the watcher asks for, until it asks for nothing.

        Raises:
            OSError: the watcher does not answer.
        """
        while True:
            line = stream.readline()
            if not line:
                raise OSError("the watcher is gone")
            wanted = json.loads(line)
            if "stacks" in wanted:
                _send(stream, {"stacks": self._stacks_now(), "pending": self._pending()})
            elif "inspect" in wanted:
                _send(stream, {"inspected": inspect_process(**wanted["inspect"])})
            elif "end" in wanted:
                for pid in wanted["kill"]:
                    kill(pid)
                end_hung(wanted["end"])
            else:
                return

    def _describe(self) -> dict[str, Any]:
        state = self._state
        keys = list(state["keys"][:MOST_KEYS])
        return state | {"keys": keys, "idle": time.monotonic() - self._changed}

    def _stacks_now(self) -> dict[str, str]:
        frame = sys._current_frames().get(self._main or 0)
        innermost = traceback.extract_stack(frame)[-FRAMES:]
        place = " < ".join(f"{f.name} ({_short(f.filename)}:{f.lineno})" for f in innermost[::-1])
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return {"place": place, "all": file.read()}

    def _end_unwatched(self, error: Exception) -> None:
        idle = self._describe()
        end_hung(
            f"rank {self._rank}: the watcher of the job, on the first rank's host, does not answer: {error}; step "
            f"{idle['step']}, {idle['phase']}"
        )


def inspect_process(pid: int, stack_file: str) -> dict[str, Any]:
    """Describe a process of this host that does not answer.

    Returns:
        state: letter of Linux for it, such as T (stopped) or D (waits for a device); empty if the
            process is gone.
        pressure: percent of the last 10 seconds in which all processes of the host waited for
            memory.
        stacks: what the process wrote to its stack file when asked to.
    """
    state = process_state(pid)
    stacks = ""
    if state and state not in "TtZ":
        with contextlib.suppress(OSError):
            os.kill(pid, STACK_SIGNAL)
            time.sleep(0.5)
            stacks = Path(stack_file).read_text(errors="replace")
    return {"state": state, "pressure": memory_pressure(), "stacks": stacks}


def process_state(pid: int) -> str:
    """Return Linux's letter for the state of a process; empty if it is gone."""
    try:
        # After the name, which may hold anything, in parentheses.
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def memory_pressure() -> float:
    """Return the percent of the last 10 seconds in which the host did nothing but wait for memory."""
    try:
        lines = (_PROC / "pressure" / "memory").read_text().splitlines()
        full = next(line for line in lines if line.startswith("full"))
        return float(full.split()[1].removeprefix("avg10="))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0.0


def kill(pid: int) -> None:
    """Kill a process, which may be stopped or gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
