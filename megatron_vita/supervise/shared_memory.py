"""Anonymous memory shared by file descriptor: it has no name, so that nothing is left behind
whichever process dies."""

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import IO

import numpy as np


class SharedArray:
    """A uint8 array filled by one process and sent to another without a copy. It must be closed."""

    def __init__(self) -> None:
        self._descriptor = -1

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """Allocate the array; may be called once."""
        assert self._descriptor < 0, "allocated before"
        size = int(np.prod(shape))
        self._descriptor = os.memfd_create("tiles", os.MFD_CLOEXEC)
        # An empty file cannot be mapped.
        os.ftruncate(self._descriptor, max(size, 1))
        shared = mmap.mmap(self._descriptor, 0)
        return np.frombuffer(shared, dtype=np.uint8, count=size).reshape(shape)

    def send(self, pipe: Connection) -> None:
        """Send the memory to the process at the other end of a pipe."""
        send_handle(pipe, self._descriptor, 0)  # the process is named on Windows alone

    def close(self) -> None:
        """Release this process's hold of the memory, apart from arrays in it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


def receive_array(pipe: Connection, shape: tuple[int, ...]) -> np.ndarray:
    """Receive an array from the other end; its memory is freed with the array."""
    descriptor = recv_handle(pipe)
    try:
        # The map keeps the memory alive after the descriptor is closed.
        shared = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    return np.frombuffer(shared, dtype=np.uint8)[: int(np.prod(shape))].reshape(shape)


class SharedFile:
    """Bytes that other processes read as a file. The memory is freed with the object and its last
    reader."""

    def __init__(self, data: bytes) -> None:
        self._file = os.fdopen(os.memfd_create("media", os.MFD_CLOEXEC), "wb")
        self._file.write(data)
        self._file.flush()

    def send(self, pipe: Connection) -> None:
        """Send the file to the process at the other end of a pipe."""
        send_handle(pipe, self._file.fileno(), 0)


def receive_file(pipe: Connection) -> IO[bytes]:
    """Receive a file from the other end; the caller reads and closes it."""
    descriptor = recv_handle(pipe)
    try:
        # a place of its own in the file, which processes would share
        return open(f"/proc/self/fd/{descriptor}", "rb")
    finally:
        os.close(descriptor)
