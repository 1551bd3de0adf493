"""Reads media in processes that may be killed: whatever a file does to a decoder, only its own
request ends.

For each connection that comes through standard input, a Unix socket, the program forks a reader,
which answers one question at a time. The kernel ends it, also in the midst of a decoder, where an
answer takes too long.
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
from megatron_vita.inference.vision.decode_pool import Answer, Probe, Question
from megatron_vita.media.video import probe_video
from megatron_vita.supervise.processes import end_with
from megatron_vita.supervise.shared_memory import SharedArray, receive_file

logger = logging.getLogger(__name__)


def main() -> None:
    """Forks readers until the other end of standard input is closed."""
    logging.basicConfig(level=logging.WARNING, format="media %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # who started this decides, and may have answers to finish
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended readers need not be waited for
    with socket.socket(fileno=sys.stdin.fileno()) as orders:
        while True:
            _, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
            if not descriptors:
                return
            with suppress(OSError):  # where there can be no further process, its question ends
                if os.fork() == 0:
                    _live(orders, Connection(descriptors[0]))
            os.close(descriptors[0])


def _live(orders: socket.socket, pipe: Connection) -> NoReturn:
    """A reader's whole life."""
    try:
        orders.detach()
        os.close(0)
        serve(pipe)
    finally:
        os._exit(0)


def serve(pipe: Connection) -> None:
    """A reader's life: it answers questions, each with the seconds that it may take, until the
    other end is closed."""
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            seconds, question = pipe.recv()
            file = receive_file(pipe)
            # whose signal ends the process: Python does not handle it
            signal.setitimer(signal.ITIMER_REAL, seconds)
            tiles = SharedArray()
            with _ends_with(pipe):
                answer = _answer(question, file, tiles)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)
            if isinstance(answer, tuple):
                tiles.send(pipe)
            tiles.close()
            file.close()


@contextmanager
def _ends_with(pipe: Connection) -> Iterator[None]:
    """Meanwhile the kernel ends this process when the other end of a pipe is closed or shut
    down."""
    flags = fcntl.fcntl(pipe.fileno(), fcntl.F_GETFL)
    end_with(pipe.fileno())
    if pipe.poll():  # closed before
        raise EOFError
    yield
    fcntl.fcntl(pipe.fileno(), fcntl.F_SETFL, flags)


def _answer(question: Question, file: IO[bytes], tiles: SharedArray) -> Answer:
    """What a question asks; decoded tiles lie in `tiles`. DataError for whatever is wrong with the
    file."""
    try:
        if isinstance(question, Probe):
            return probe_video(file, question.name)
        side = question.form.size
        out = tiles.allocate((len(question.tiles), 3, side, side))
        decode_tiles(
            question.medium,
            file,
            name=question.name,
            tiles=question.tiles,
            form=question.form,
            out=out,
        )
        return out.shape
    except DataError as error:
        return error.with_traceback(None)
    except Exception as error:
        logger.exception("%s", question.name)
        return DataError(f"{question.name}: cannot be read: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
