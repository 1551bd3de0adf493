"""What a reader process does: takes tasks from a pipe, shows what it works on, sends packs back.

Tiles are decoded into shared memory that has no name, so that nothing is copied and nothing is left behind, whoever
dies when.
"""

import mmap
import os
import pickle
import signal
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.reduction import recv_handle, send_handle
from typing import NamedTuple

import numpy as np
import torch

from megatron_vita.data.batch import Batch
from megatron_vita.data.ledger import Damage
from megatron_vita.data.stream import PackStream
from megatron_vita.errors import VitaError


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
        self.tell(-1)

    def tell(self, document: int) -> None:
        """`document` is being read from now on."""
        self._cells[1] = time.monotonic_ns()  # the clock of all processes
        self._cells[0] = document

    @property
    def document(self) -> int | None:
        """The document that is being read; None before the first."""
        return None if self._cells[0] < 0 else self._cells[0]

    @property
    def silence(self) -> float:
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


def tell(pipe: Connection, message: Message) -> None:
    """Sends a message by value: torch's own way through a pipe needs room in /dev/shm and a living sender."""
    pipe.send_bytes(pickle.dumps(message, protocol=5))


def hear(pipe: Connection) -> Message:
    """Receives a message."""
    return pickle.loads(pipe.recv_bytes())


def work(pipe: Connection, stream: PackStream, progress: Progress) -> None:
    """Reads packs until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    try:
        progress.reset()
        tell(pipe, Ready())
        while True:
            _answer(pipe, stream, pipe.recv(), progress)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(pipe: Connection, stream: PackStream, task: PackTask, progress: Progress) -> None:
    memory = _TileMemory()
    try:
        batch, damages = stream.read(task.pack_id, skip=task.skip, progress=progress.tell, allocate=memory.allocate)
    except VitaError as error:
        tell(pipe, Failure(error.with_traceback(None), ""))
    except Exception:  # a mistake of ours, shown by the parent
        tell(pipe, Failure(None, traceback.format_exc()))
    else:
        tell(pipe, SentPack(replace(batch, tiles=torch.empty(0)), damages, tuple(batch.tiles.shape)))
        send_handle(pipe, memory.descriptor, 0)  # the process is named on Windows alone
    finally:
        memory.close()


def receive_tiles(pipe: Connection, shape: tuple[int, ...]) -> torch.Tensor:
    """The tiles that follow a `SentPack`, in memory that goes when the tensor does."""
    descriptor = recv_handle(pipe)
    try:
        shared = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    return torch.frombuffer(shared, dtype=torch.uint8)[: int(np.prod(shape))].view(shape)


class _TileMemory:
    """Memory of one pack's tiles, shared by file descriptor."""

    descriptor = -1

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        self.descriptor = os.memfd_create("tiles", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, max(size, 1))
        shared = mmap.mmap(self.descriptor, 0)
        return np.frombuffer(shared, dtype=np.uint8, count=size).reshape(shape)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
