"""Decodes media in processes that may be killed: whatever a file does to a decoder ends its own
request alone.

The program forks a process for each connection that arrives through standard input, a Unix socket.
A process answers one request at a time; a kernel timer ends it, even inside a decoder, when a reply
takes too long.
"""

import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import IO, NoReturn

import torch

from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.errors import DataError
from megatron_vita.inference.vision.decode_pool import DecodeReply, DecodeRequest, ProbeVideo
from megatron_vita.media.video import probe_video
from megatron_vita.supervise.processes import end_with
from megatron_vita.supervise.shared_memory import SharedArray, receive_file

logger = logging.getLogger(__name__)


def main() -> None:
    """Fork decoding processes until the other end of standard input closes."""
    logging.basicConfig(level=logging.WARNING, format="media %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # who started this decides, and may have answers to finish
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended readers need not be waited for
    with socket.socket(fileno=sys.stdin.fileno()) as orders:
        while True:
            _, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
            if not descriptors:
                break
            with suppress(OSError):  # where there can be no further process, its request ends
                if os.fork() == 0:
                    _live(orders, Connection(descriptors[0]))
            # The child has its own copy.
            os.close(descriptors[0])
    with suppress(ChildProcessError):  # raised when the last reader has ended
        os.wait()


def _live(orders: socket.socket, pipe: Connection) -> NoReturn:
    """Run a forked process from its fork to its exit."""
    try:
        orders.detach()
        os.close(0)
        serve(pipe)
    finally:
        os._exit(0)


def serve(pipe: Connection) -> None:
    """Answer requests, each with its time limit, until the other end closes."""
    # Parallelism comes from the number of processes.
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            seconds, request = pipe.recv()
            file = receive_file(pipe)
            # whose signal ends the process: Python does not handle it
            signal.setitimer(signal.ITIMER_REAL, seconds)
            # Pixels go back as shared memory: they are too large for a pipe.
            tiles = SharedArray()
            with _ends_with(pipe):
                answer = _answer(request, file, tiles)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)
            if isinstance(answer, tuple):
                tiles.send(pipe)
            tiles.close()
            file.close()


@contextmanager
def _ends_with(pipe: Connection) -> Iterator[None]:
    """Let the kernel end this process when the other end of a pipe is closed or shut down."""
    flags = fcntl.fcntl(pipe.fileno(), fcntl.F_GETFL)
    end_with(pipe.fileno())
    if pipe.poll():  # closed before
        raise EOFError
    yield
    fcntl.fcntl(pipe.fileno(), fcntl.F_SETFL, flags)


def _answer(request: DecodeRequest, file: IO[bytes], tiles: SharedArray) -> DecodeReply:
    """Answer a request; decoded tiles are left in `tiles`.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        if isinstance(request, ProbeVideo):
            return probe_video(file, request.name)
        side = request.tile_format.size
        out = tiles.allocate((len(request.tiles), 3, side, side))
        decode_tiles(
            request.medium,
            file,
            name=request.name,
            tiles=request.tiles,
            tile_format=request.tile_format,
            out=out,
        )
        return out.shape
    except DataError as error:
        return error.with_traceback(None)
    except Exception as error:
        logger.exception("%s", request.name)
        return DataError(f"{request.name}: cannot be read: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is left to be done, and the interpreter would take seconds to end
