"""Writing of one rank's share of a checkpoint, in this process or in one of its own."""

import gc
import io
import mmap
import multiprocessing
import os
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vita.checkpoint.manifest import Span
from megatron_vita.supervise.processes import WorkerProcess

PROGRESS_SECONDS = 1.0
"""Interval at which a waiting rank checks the progress of its process."""
_COUNT = struct.Struct("q")
NICENESS = 10
"""Added to that of a writer process, so that it does not slow the step."""


@dataclass(kw_only=True)
class Written:
    """Result of a rank's writing, or the reason of its failure."""

    results: list[WriteResult] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)  # by file
    error: str = ""


@dataclass(kw_only=True)
class Share:
    """Part of a checkpoint that a rank writes, as megatron-core has planned it."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None  # of the whole checkpoint; on the first rank alone
    note_progress: Callable[[], None] = lambda: None  # called after each tensor

    def copy_to_host(self) -> None:
        """Copy the tensors to host memory, so that the next step may change the device's."""
        buckets = self.writer.write_buckets or []
        self.writer.write_buckets = FileSystemWriterAsync.preload_tensors(buckets, True)

    def write(self) -> Written:
        """Write the files, one tensor after the other.

        Of tensors on the device only one is in host memory at a time.
        """
        written = Written()
        try:
            for path, name, (objects, tensors) in self.writer.write_buckets or []:
                with open(path, "wb") as file:
                    written.spans[name] = []
                    for item, data in (*objects, *tensors):
                        self._write_item(file, data, item=item, name=name, written=written)
                        self.note_progress()
                    file.flush()
                    os.fsync(file.fileno())
        # Any error must reach all ranks, which wait for this one.
        except Exception as error:
            written.error = str(error) or type(error).__name__
        return written

    def _write_item(
        self, file: BinaryIO, data: Any, *, item: Any, name: str, written: Written
    ) -> None:
        stream = _CheckedStream(file)
        if isinstance(data, torch.Tensor):
            data = _without_rest(data.cpu())
        result = _write_item(
            self.writer.transforms,
            stream,
            data,
            item,
            name,
            serialization_format=SerializationFormat.TORCH_SAVE,
        )
        written.results.append(result)
        written.spans[name].append(stream.span)


def _without_rest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is all of its storage, which torch writes as a whole."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone()


class PlannedSave(TorchDistSaveShardedStrategy):
    """megatron-core's `torch_dist` format; what is planned is left to the caller to write."""

    share: Share

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: Any
    ) -> AsyncRequest:
        _, metadata, _ = save_state_dict_ret
        self.share = Share(writer=writer, metadata=metadata)
        return AsyncRequest(None, (), [])


class Progress:
    """Count of what a process has done, in memory that its parent sees."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _COUNT.size)

    @property
    def count(self) -> int:
        """Number of calls of `note`."""
        count: int = _COUNT.unpack_from(self._memory)[0]
        return count

    def note(self) -> None:
        """Add one; called by one process alone."""
        _COUNT.pack_into(self._memory, 0, self.count + 1)


class WriterProcess(WorkerProcess):
    """Process that writes for a rank while the rank continues, and ends together with it.

    It is forked from the rank, so that it has the rank's memory as it is now, without a copy.

    Args:
        write: returns what it has written.
        progress: what `write` notes its progress with.
    """

    def __init__(self, write: Callable[[], Written], *, progress: Progress | None = None) -> None:
        self._progress = progress or Progress()
        with warnings.catch_warnings():
            # Python warns of threads, whose locks the child would wait for; it takes none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            super().__init__(multiprocessing.get_context("fork"), _write_and_send, write)

    @property
    def is_writing(self) -> bool:
        """True until `result` returns at once."""
        return not self.pipe.poll()

    def result(self, on_progress: Callable[[], None] = lambda: None) -> Written:
        """Wait for the process, and return what it has written.

        on_progress: called now and then while the process makes progress.
        """
        seen = self._progress.count
        while not self.pipe.poll(PROGRESS_SECONDS):
            count = self._progress.count
            if count != seen:
                on_progress()
            seen = count
        try:
            written: Written = self.pipe.recv()
        except EOFError:
            written = Written(error=f"the writer process ended with code {self.exit_code()}")
        self.kill()
        return written


def _write_and_send(pipe: Connection, write: Callable[[], Written]) -> None:
    # A collection would run destructors of the rank's objects on the device.
    gc.disable()
    os.nice(NICENESS)
    # A scheduler may send it to all processes of a job; the rank decides about the save.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A fork has none of the threads that torch would give work to, and would wait for them.
    torch.set_num_threads(1)
    pipe.send(write())
    # At once: nothing that the rank has open is this process's to close.
    os._exit(0)


class _CheckedStream(io.IOBase):
    """A stream that writes to a file and computes the span of what it has written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start = file.tell()
        self._checksum = 0

    @property
    def span(self) -> Span:
        """Span from where the stream began."""
        return self._start, self._file.tell() - self._start, self._checksum

    def write(self, data: Any) -> int:
        self._checksum = zlib.crc32(data, self._checksum)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()
