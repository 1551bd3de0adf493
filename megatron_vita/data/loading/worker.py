"""What a reader process does: takes tasks from a pipe, shows what it works on, sends packs back.

Tiles are decoded into shared memory that has no name, so that nothing is copied and nothing is left
behind, whoever dies when.
"""

import pickle
import signal
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import NamedTuple

import torch

from megatron_vita.data.batch import Batch
from megatron_vita.data.loading.ledger import Damage
from megatron_vita.data.loading.stream import PackStream
from megatron_vita.errors import VitaError
from megatron_vita.supervise.processes import end_with_parent
from megatron_vita.supervise.shared_memory import SharedArray


class PackTask(NamedTuple):
    """A pack to read, without the documents to `skip`."""

    pack_id: int
    skip: frozenset[int] = frozenset()


class Ready(NamedTuple):
    """The process has started."""


class Progress:
    """Which document a reader is at, and since when, in memory that both processes see.

    A message instead would cost two processes as much time as a short text takes to be read.
    """

    def __init__(self, context: BaseContext) -> None:
        self._cells = context.RawArray("q", 2)
        self.reset()

    def reset(self) -> None:
        """A task begins, and no document yet."""
        self.report(-1)

    def report(self, document: int) -> None:
        """`document` is being read from now on."""
        self._cells[1] = time.monotonic_ns()  # the clock of all processes
        self._cells[0] = document

    @property
    def document(self) -> int | None:
        """The document that is being read; None before the first."""
        if self._cells[0] < 0:
            return None
        return self._cells[0]

    @property
    def idle_seconds(self) -> float:
        """Seconds since it was last told."""
        return time.monotonic() - self._cells[1] / 1e9


class Failure(NamedTuple):
    """Why a pack cannot be read: an error for the user, or the traceback of a mistake of ours."""

    error: VitaError | None
    trace: str


class SentPack(NamedTuple):
    """A pack whose tiles, of this shape, follow as a file descriptor."""

    batch: Batch
    damages: list[Damage]
    shape: tuple[int, ...]


Message = Ready | Failure | SentPack


def send_message(pipe: Connection, message: Message) -> None:
    """Sends a message by value: torch's own way through a pipe needs room in /dev/shm and a living
    sender."""
    pipe.send_bytes(pickle.dumps(message, protocol=5))


def receive_message(pipe: Connection) -> Message:
    """Receives a message."""
    return pickle.loads(pipe.recv_bytes())


def run_worker(pipe: Connection, pickled: bytes, progress: Progress) -> None:
    """Reads packs of a pickled PackStream until the other end of the pipe is closed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    try:
        stream = _unpickled(pickled)
        progress.reset()
        send_message(pipe, Ready())
        while True:
            _answer(pipe, stream, pipe.recv(), progress)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _unpickled(pickled: bytes) -> PackStream | VitaError:
    """The stream, or why it cannot be had here."""
    try:
        return pickle.loads(pickled)
    except VitaError as error:
        return error.with_traceback(None)


def _answer(
    pipe: Connection, stream: PackStream | VitaError, task: PackTask, progress: Progress
) -> None:
    memory = SharedArray()
    try:
        if isinstance(stream, VitaError):
            raise stream
        batch, damages = stream.read(
            task.pack_id, skip=task.skip, progress=progress.report, allocate=memory.allocate
        )
    except VitaError as error:
        send_message(pipe, Failure(error.with_traceback(None), ""))
    except Exception:  # a mistake of ours, shown by the parent
        send_message(pipe, Failure(None, traceback.format_exc()))
    else:
        send_message(
            pipe, SentPack(replace(batch, tiles=torch.empty(0)), damages, tuple(batch.tiles.shape))
        )
        memory.send(pipe)
    finally:
        memory.close()
