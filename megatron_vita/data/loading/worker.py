"""Loader process: receives tasks through a pipe, reports progress, sends packs back.

Tiles are decoded into shared memory without a name: nothing is copied, and nothing remains when a
process dies at any time.
"""

import pickle
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
from megatron_vita.supervise.shared_memory import SharedArray


class PackTask(NamedTuple):
    """A pack to read, without the documents of `skip`."""

    pack_id: int
    skip: frozenset[int] = frozenset()


class Ready(NamedTuple):
    """Message of a process that has started."""


class DocumentProgress:
    """Index of the document that a reader works on, and since when, in shared memory.

    A message instead would take both processes as long as reading a short text.
    """

    def __init__(self, context: BaseContext) -> None:
        self._cells = context.RawArray("q", 2)
        self.reset()

    def reset(self) -> None:
        """Record the start of a task, before its first document."""
        self.report(-1)

    def report(self, document: int) -> None:
        """Record that `document` is read from now on."""
        # The time first: a new document must never be seen with an old time. The monotonic clock is
        # the same in all processes of a host.
        self._cells[1] = time.monotonic_ns()
        self._cells[0] = document

    @property
    def document(self) -> int | None:
        """Index of the document that is being read; None before the first."""
        if self._cells[0] < 0:
            return None
        return self._cells[0]

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self._cells[1] / 1e9


class Failure(NamedTuple):
    """Failure to read a pack: an error for the user, or the traceback of a bug of ours."""

    error: VitaError | None
    trace: str


class SentPack(NamedTuple):
    """A pack whose tiles, of `shape`, follow as a file descriptor."""

    batch: Batch
    damages: list[Damage]
    shape: tuple[int, ...]


Message = Ready | Failure | SentPack


def send_message(pipe: Connection, message: Message) -> None:
    """Send a message by value.

    torch's own pickling of tensors for pipes needs room in /dev/shm and a sender that is alive.
    """
    pipe.send_bytes(pickle.dumps(message, protocol=5))


def receive_message(pipe: Connection) -> Message:
    """Receive a message."""
    return pickle.loads(pipe.recv_bytes())


def run_worker(pipe: Connection, pickled: bytes, progress: DocumentProgress) -> None:
    """Read packs of a pickled PackStream until the other end of the pipe is closed."""
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
    """Unpickle the stream; returns the VitaError if that fails."""
    try:
        return pickle.loads(pickled)
    except VitaError as error:
        return error.with_traceback(None)


def _answer(
    pipe: Connection, stream: PackStream | VitaError, task: PackTask, progress: DocumentProgress
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
    except Exception:
        # A bug of ours: the parent raises it with this traceback.
        send_message(pipe, Failure(None, traceback.format_exc()))
    else:
        send_message(
            pipe, SentPack(replace(batch, tiles=torch.empty(0)), damages, tuple(batch.tiles.shape))
        )
        memory.send(pipe)
    finally:
        memory.close()
