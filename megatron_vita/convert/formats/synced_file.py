"""Files that are flushed to disk while they are written, so that the final fsync is short."""

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PIECE = 1 << 20  # bytes
_STEP = 256 << 20  # bytes between two requests to write to the disk


class SyncedFile(io.FileIO):
    """A new file; `close` returns once all of it is on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._worker = ThreadPoolExecutor(1)
        self._request: Future[None] | None = None
        self._since = 0

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        left = view
        # One large write takes the system several times as long as pieces of 1 MiB.
        while len(left):
            left = left[super().write(left[:_PIECE]) :]
        self._since += len(view)
        # Flushing in a thread keeps the disk busy while the next tensors are computed.
        if self._since >= _STEP and (self._request is None or self._request.done()):
            self._since = 0
            self._request = self._worker.submit(os.fdatasync, self.fileno())
        return len(view)

    def close(self) -> None:
        """Flush and close.

        Raises:
            OSError: this flush or an earlier one failed, for instance because the disk is full.
        """
        if self.closed:
            return
        try:
            self._worker.shutdown()
            if self._request is not None:
                self._request.result()
            os.fsync(self.fileno())
        finally:
            super().close()
