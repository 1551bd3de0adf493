"""A pool of processes that decode media (`decode_worker.py`), shared by the engine's threads."""

import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np

from megatron_vita.data.samples.encoding import Medium, TileFormat
from megatron_vita.errors import DataError, PlatformError
from megatron_vita.media.video import VideoInfo
from megatron_vita.supervise.shared_memory import SharedFile, receive_array

PROGRAM = "megatron_vita.inference.vision.decode_worker"
MOST_DESCRIPTORS = 1 << 16
_STOPPED = "it is read no longer"
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Keeps libraries from starting threads in the program: forks of a process with threads could hang."""


class ProbeVideo(NamedTuple):
    """Request for a video's duration, rate and size. The file follows; the reply is a VideoInfo."""

    name: str


class Decode(NamedTuple):
    """Request for the pixels of tiles. The file follows; the reply is a shape, followed by an array
    of it."""

    name: str
    medium: Medium
    tiles: range
    tile_format: TileFormat


DecodeRequest = ProbeVideo | Decode
DecodeReply = VideoInfo | tuple[int, ...] | DataError


class DecodePool:
    """At most `count` decoding processes. Any thread may use it; callers beyond `count` wait their
    turn."""

    def __init__(self, tile_format: TileFormat, *, count: int, seconds: float) -> None:
        """`seconds`: time limit of one request. Processes are started on demand."""
        self.tile_format = tile_format
        self._seconds = seconds
        self._busy: dict[_DecodeProcess, SharedFile] = {}  # and what they read
        self._stopped: WeakSet[SharedFile] = WeakSet()
        self._lock = threading.Lock()  # of both
        # Last in, first out: few requests keep few processes alive. None stands for one not
        # started.
        self._free: queue.LifoQueue[_DecodeProcess | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)

    def probe(self, file: SharedFile, name: str) -> VideoInfo:
        """Probe a video.

        Raises:
            DataError: it is not a readable video; the message begins with `name`.
        """
        with self._asked(ProbeVideo(name), file) as pipe:
            return _checked(pipe.recv())

    def decode(self, file: SharedFile, medium: Medium, *, name: str, tiles: range) -> np.ndarray:
        """Decode tiles of a medium: uint8 [n, 3, S, S].

        Raises:
            DataError: it is damaged; the message begins with `name`.
        """
        with self._asked(Decode(name, medium, tiles, self.tile_format), file) as pipe:
            return receive_array(pipe, _checked(pipe.recv()))

    def stop(self, file: SharedFile) -> None:
        """Cancel all reads of `file`: pending callers get DataError, and the processes that decode
        it are shut down."""
        with self._lock:
            # Also for requests that are about to start: `_begin` looks it up under the same lock.
            self._stopped.add(file)
            self._hang_up([reader for reader, read in self._busy.items() if read is file])

    def close(self) -> None:
        """Cancel all reads, whose callers get DataError, and end all processes."""
        with self._lock:
            self._hang_up(list(self._busy))
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for reader in idle:
            if reader is not None:
                reader.pipe.close()
            self._free.put(None)

    def _hang_up(self, readers: "list[_DecodeProcess]") -> None:
        """Shut processes down. The caller holds the lock, so that none has been given to another
        request."""
        for reader in readers:
            del self._busy[reader]
            # Shutting down a duplicate ends the connection without closing a descriptor that
            # another thread is reading.
            with socket.socket(fileno=os.dup(reader.pipe.fileno())) as pipe:
                pipe.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _asked(self, request: DecodeRequest, file: SharedFile) -> Iterator[Connection]:
        """Send a request to a process and yield its pipe. A process that ends without a reply is
        blamed on the file: DataError."""
        reader = self._free.get()
        good = None
        began = time.monotonic()
        try:
            reader = reader or connect()
            self._begin(reader, request, file)
            reader.pipe.send((self._seconds, request))
            file.send(reader.pipe)
            yield reader.pipe
            # Only a process that answered can be given the next request.
            good = reader
        except DataError:
            good = reader
            raise
        except (EOFError, OSError) as error:
            if reader is None:
                raise DataError(
                    f"{request.name}: no decoding process can be started: {error}"
                ) from error
            raise DataError(f"{request.name}: {self._why_ended(reader, began)}") from error
        finally:
            with self._lock:
                # A process hung up in the meantime must not be reused, although it answered.
                if reader is None or self._busy.pop(reader, None) is None:
                    good = None  # also where it answered, and was hung up then
            self._free.put(good)

    def _begin(self, reader: "_DecodeProcess", request: DecodeRequest, file: SharedFile) -> None:
        with self._lock:
            self._busy[reader] = file
            if file in self._stopped:
                raise DataError(f"{request.name}: {_STOPPED}")

    def _why_ended(self, reader: "_DecodeProcess", began: float) -> str:
        """Reason why a process that was asked at `began` gave no reply.

        Raises:
            PlatformError: it is not the file's fault.
        """
        with self._lock:
            if reader not in self._busy:
                return _STOPPED
        # A dead fork server ends all its processes, whatever their files.
        check(reader.program)
        if time.monotonic() - began >= self._seconds:
            return f"reading it takes more than {self._seconds:g} seconds"
        return "reading it ends the process that does it"


class _Program(NamedTuple):
    """The running fork server; closing `orders` ends it."""

    process: subprocess.Popen[bytes]
    orders: socket.socket


@dataclass(frozen=True, eq=False)
class _DecodeProcess:
    """The pipe to a decoding process, and the fork server that started it."""

    pipe: Connection
    program: _Program


_programs: dict[str, _Program] = {}
_lock = threading.Lock()


def start() -> _Program:
    """Start the fork server of decoding processes, one for all engines of this process, with which
    it ends.

    Returns at once; the server is ready seconds later.
    """
    with _lock:
        if PROGRAM not in _programs:
            _raise_descriptor_limit()
            orders, theirs = socket.socketpair()
            # The program must import this package as this process does, installed or not.
            paths = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", PROGRAM],
                    stdin=theirs.fileno(),
                    env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
                )
            _programs[PROGRAM] = _Program(process, orders)
        return _programs[PROGRAM]


def stop(*, seconds: float = 1.0) -> None:
    """End the program, which ends its readers; killed where it takes longer."""
    with _lock:
        program = _programs.pop(PROGRAM, None)
    if program is None:
        return
    # The server ends when its end of the socket reads end-of-file.
    program.orders.close()
    try:
        program.process.wait(seconds)
    except subprocess.TimeoutExpired:
        program.process.kill()
        program.process.wait()


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files: each file of each prompt under way has a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connect() -> _DecodeProcess:
    """Fork a decoding process.

    Raises:
        PlatformError: the fork server has ended.
    """
    program = start()
    (ours, theirs) = socket.socketpair()
    with theirs:
        try:
            socket.send_fds(program.orders, [b"."], [theirs.fileno()])
        except OSError as error:
            check(program)
            raise PlatformError("the program that reads media cannot be reached") from error
    return _DecodeProcess(Connection(ours.detach()), program)


def check(program: _Program) -> None:
    """Raise PlatformError if the fork server has ended; the next `start` makes another."""
    with suppress(subprocess.TimeoutExpired):
        # A moment, since the pipe breaks before the exit code is known.
        code = program.process.wait(timeout=0.2)
        with _lock:
            if _programs.get(PROGRAM) is program:
                del _programs[PROGRAM]
        raise PlatformError(
            f"the program that reads media has ended with code {code}; is there memory enough?"
        )


def _checked[T](answer: T | DataError) -> T:
    if isinstance(answer, DataError):
        raise answer
    return answer
