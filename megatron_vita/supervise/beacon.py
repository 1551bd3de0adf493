"""State of a rank, sent to the watcher of its job by a thread, whatever the rank waits for.

The channel is a TCP connection of its own, which a hanging collective does not block. Messages are
lines of JSON. A rank sends its state; the watcher answers, and may ask for the rank's stacks, for
the state of another process on its host, or for the rank to end.
"""

import contextlib
import faulthandler
import json
import logging
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

from megatron_vita.supervise.last_words import open_state_file
from megatron_vita.supervise.rank_failure import end_hung

Phase = Literal[
    "starting", "loading", "forward", "backward", "optimizer", "metrics", "validation", "saving",
    "callbacks", "restoring",
]  # fmt: skip
STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks to its stack file, also while native code holds the interpreter."""
FRAMES = 4
"""Number of innermost frames of the main thread in a one-line report."""
MOST_KEYS = 100
"""Most sample keys in a message."""
KEY_SECONDS = 2.0
"""Time to look up the samples of a pack that has not arrived."""
_PROC = Path("/proc")
logger = logging.getLogger(__name__)


class Beacon:
    """This rank's state, and the thread that sends it.

    Args:
        rank: number of this rank.
        address: host and port of the watcher.
        token: secret that the watcher expects.
        interval: seconds between two messages.
        timeout: seconds without an answer after which the watcher counts as lost; the rank then
            watches itself, and ends after the same time without progress.
        pending: returns descriptions of the collectives that this rank waits for.
        awaited: returns the samples of a pack that this rank waits for, by its number in the step,
            or in the validation.
    """

    def __init__(
        self,
        rank: int,
        *,
        address: tuple[str, int],
        token: str,
        interval: float,
        timeout: float,
        pending: Callable[[], list[dict[str, Any]]] = list,
        awaited: Callable[[int, bool], Sequence[str]] = lambda number, held_out: (),
    ) -> None:
        self._rank = rank
        self._interval = interval
        self._timeout = timeout
        self._pending = pending
        self._awaited = awaited
        self._state: dict[str, Any] = {
            "step": 0, "micro_batch": 0, "phase": "starting", "keys": [], "held_out": False,
        }  # fmt: skip
        self._changed = time.monotonic()
        self._main = threading.main_thread().ident
        # Without a name: nothing is left of it, however the rank ends.
        self._stacks = os.memfd_create("stacks", os.MFD_CLOEXEC)
        self._notes = open_state_file()
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        hello = {"rank": rank, "token": token, "host": socket.gethostname(), "pid": os.getpid()}
        files = f"/proc/{os.getpid()}/fd"
        self._hello = hello | {
            "stack_file": f"{files}/{self._stacks}",
            "state_file": f"{files}/{self._notes}",
        }
        self._closed = threading.Event()
        self._socket = socket.create_connection(address, timeout=timeout)
        self._thread = threading.Thread(target=self._run, name="beacon", daemon=True)
        self._thread.start()

    def enter(
        self,
        phase: Phase,
        *,
        step: int | None = None,
        micro_batch: int | None = None,
        keys: Sequence[str] | None = None,
        held_out: bool | None = None,
    ) -> None:
        """Note what the rank does from now on, which counts as progress; omitted values stay.

        Args:
            phase: part of the step.
            step: number of the step, from 1.
            micro_batch: number of the pack in the step, from 1.
            keys: samples of the pack.
            held_out: the packs are those of a validation.
        """
        state = dict(self._state, phase=phase)
        if step is not None:
            state |= {"step": step, "micro_batch": 0, "keys": []}
        if micro_batch is not None:
            state |= {"micro_batch": micro_batch, "keys": []}
        if keys is not None:
            state["keys"] = keys
        if held_out is not None:
            state |= {"held_out": held_out, "micro_batch": 0, "keys": []}
        # One assignment: the thread never sees half of a state.
        self._state = state
        self._changed = time.monotonic()
        # For others to read if this process is stopped before the thread's next message.
        note = json.dumps(self._shortened() | {"changed": self._changed}).encode()
        os.pwrite(self._notes, note + b"\n", 0)

    def close(self) -> None:
        """Sign off from the watcher, and end the thread."""
        self._closed.set()
        self._thread.join(self._interval + 1)
        with contextlib.suppress(OSError):
            self._socket.close()
        faulthandler.unregister(STACK_SIGNAL)
        os.close(self._stacks)
        os.close(self._notes)

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
                logger.warning("rank %d: the watcher does not answer: %s", self._rank, error)
            self._watch_alone()

    def _answer(self, stream: Any) -> None:
        """Serve the watcher's requests until it has none.

        Raises:
            OSError: the watcher does not answer.
        """
        while True:
            line = stream.readline()
            if not line:
                raise OSError("the watcher is gone")
            wanted = json.loads(line)
            if "stacks" in wanted:
                answer = {"stacks": self._stacks_now(), "pending": self._pending()}
                _send(stream, answer | {"keys": self._keys_now()})
            elif "inspect" in wanted:
                _send(stream, {"inspected": inspect_process(**wanted["inspect"])})
            elif "end" in wanted:
                end_hung(wanted["end"], others=wanted["kill"])
            else:
                return

    def _describe(self) -> dict[str, Any]:
        return self._shortened() | {"idle": time.monotonic() - self._changed}

    def _shortened(self) -> dict[str, Any]:
        state = self._state
        return state | {"keys": list(state["keys"][:MOST_KEYS])}

    def _keys_now(self) -> list[str]:
        """Return the samples of the current pack, or of the one that the rank waits for."""
        state = self._state
        if state["keys"] or state["phase"] != "loading":
            return list(state["keys"][:MOST_KEYS])
        found: list[str] = []
        # In a thread: the file system that the pack waits for may hold the samples' names, too.
        asking = threading.Thread(
            target=lambda: found.extend(self._awaited(state["micro_batch"], state["held_out"])),
            daemon=True,
        )
        asking.start()
        asking.join(KEY_SECONDS)
        return found[:MOST_KEYS]

    def _stacks_now(self) -> dict[str, str]:
        frame = sys._current_frames().get(self._main or 0)
        innermost = traceback.extract_stack(frame)[-FRAMES:]
        place = " < ".join(f"{f.name} ({_short(f.filename)}:{f.lineno})" for f in innermost[::-1])
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return {"place": place, "all": file.read()}

    def _watch_alone(self) -> None:
        """End this rank if it makes no progress: the watcher may be lost with the first rank's host."""
        while not self._closed.wait(self._interval):
            state = self._describe()
            if state["idle"] > self._timeout:
                end_hung(
                    f"rank {self._rank}: no progress for {state['idle']:.0f} s, and no watcher; "
                    f"step {state['step']}, {state['phase']}, at {self._stacks_now()['place']}"
                )


def inspect_process(pid: int, *, stack_file: str, state_file: str) -> dict[str, Any]:
    """Describe a rank of this host that does not answer.

    Returns:
        last: the state that it noted last; empty if that cannot be read.
        state: Linux's letter for the process, such as T (stopped) or D (waits for a device); empty
            if the process is gone.
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
    return {
        "state": state,
        "pressure": memory_pressure(),
        "stacks": stacks,
        "last": _read_note(state_file),
    }


def _read_note(state_file: str) -> dict[str, Any]:
    try:
        # What follows the first line is left of longer notes.
        note = json.loads(Path(state_file).read_bytes().split(b"\n", 1)[0])
        return note | {"idle": time.monotonic() - note["changed"]}
    except (OSError, ValueError):
        return {}


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
