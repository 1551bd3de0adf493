"""Decodes the tiles of prompts ahead of the step that encodes them, on the rank that does."""

import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megatron_vita.data.samples.encoding import Medium
from megatron_vita.errors import DataError
from megatron_vita.inference.requests.scheduler_output import NewSequence
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.rounding import ceil_div
from megatron_vita.supervise.shared_memory import SharedFile

DECODERS = min(16, os.cpu_count() or 1)
"""Runs of tiles that are decoded at a time."""
SHARE = max(1, DECODERS // 2)
"""Runs of one sequence decoded at a time: a video whose decoding hangs leaves room for others."""
_FEWEST = 8
_MOST = 64
"""Frames of a video in one run: a reader has to seek first, so fewer would waste work; more would take too long."""

TileKey = tuple[int, int]
"""Sequence and tile of it."""


@dataclass(frozen=True)
class _File:
    """A medium of a sequence and its file; it begins at tile `first` of the sequence."""

    name: str
    medium: Medium
    first: int
    shared: SharedFile


class _Coming(NamedTuple):
    """A tile's place in the result of a decoding job."""

    run: Future[np.ndarray]
    place: int


@dataclass
class _Queue:
    """Decoding jobs of a sequence that have not started, and the number of those running."""

    waiting: deque[tuple[Future[np.ndarray], _File, int, int]] = field(default_factory=deque)
    under_way: int = 0


class TileDecoder:
    """Decodes tiles of running sequences ahead of their use."""

    def __init__(self, readers: DecodePool) -> None:
        self.readers = readers
        self._sequences: dict[int, list[_File]] = {}
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="tiles")
        self._coming: dict[int, dict[int, _Coming]] = {}  # by sequence and tile
        self._queues: dict[int, _Queue] = {}
        self._lock = threading.Lock()  # of the queues

    def add(self, start: NewSequence) -> None:
        """Register a sequence whose tiles will be needed."""
        firsts = accumulate((medium.num_tiles for medium in start.media), initial=0)
        self._sequences[start.sequence] = [
            _File(file.name, medium, first, SharedFile(file.data))
            for file, medium, first in zip(start.files, start.media, firsts, strict=False)
        ]
        self._coming[start.sequence] = {}
        self._queues[start.sequence] = _Queue()

    def forget(self, sequence: int) -> None:
        """Drop a sequence, and cancel what is being decoded for it."""
        if (queue := self._queues.pop(sequence, None)) is not None:
            with self._lock:
                queue.waiting.clear()
        for coming in self._coming.pop(sequence, {}).values():
            # Jobs that have started cannot be cancelled; their processes are shut down below.
            coming.run.cancel()
        for file in self._sequences.pop(sequence, []):
            self.readers.stop(file.shared)

    def begin(self, sequence: int, tiles: Sequence[int]) -> None:
        """Start decoding tiles of a sequence."""
        queue = self._queues[sequence]
        for first, count in self._runs(sequence, tiles):
            run: Future[np.ndarray] = Future()
            self._coming[sequence] |= {first + place: _Coming(run, place) for place in range(count)}
            with self._lock:
                queue.waiting.append((run, self._file(sequence, first), first, count))
        self._go_on(queue)

    def close(self) -> None:
        """Cancel everything without waiting for decoders."""
        for sequence in list(self._sequences):
            self.forget(sequence)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.readers.close()

    def ready(self, sequences: Sequence[int], *, timeout: float = 0.0) -> list[int]:
        """Sequences whose submitted tiles have all finished or failed; waits up to `timeout`
        seconds for the first."""
        deadline = time.monotonic() + timeout
        while True:
            open_runs = {sequence: self._open_runs(sequence) for sequence in sequences}
            found = [sequence for sequence, runs in open_runs.items() if not runs]
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            # Any finished job may complete a sequence.
            wait(set().union(*open_runs.values()), timeout=left, return_when=FIRST_COMPLETED)

    def take(self, tiles: Sequence[TileKey]) -> tuple[np.ndarray, dict[int, str]]:
        """Pixels uint8 [n, 3, S, S] of submitted tiles, black where decoding failed, and reasons of
        failure by sequence."""
        size = self.readers.tile_format.size
        pixels = np.zeros((len(tiles), 3, size, size), dtype=np.uint8)
        failed = {}
        for place, (sequence, tile) in enumerate(tiles):
            run, offset = self._coming[sequence].pop(tile)
            try:
                pixels[place] = run.result()[offset]
            except DataError as error:
                failed[sequence] = str(error)
        return pixels, failed

    def _open_runs(self, sequence: int) -> set[Future[np.ndarray]]:
        return {
            coming.run
            for coming in self._coming.get(sequence, {}).values()
            if not coming.run.done()
        }

    def _runs(self, sequence: int, tiles: Sequence[int]) -> list[tuple[int, int]]:
        """Split tiles into jobs (first tile, count) of consecutive tiles of one medium; an image is
        one job."""
        # A video is split so that all decoders share it, in jobs long enough to be worth a seek.
        frames = min(max(ceil_div(len(tiles), DECODERS), _FEWEST), _MOST)
        runs: list[tuple[int, int]] = []
        for tile in tiles:
            first, count = runs[-1] if runs else (-1, 0)
            file = self._file(sequence, tile)
            has_room = count < frames or file.medium.grid is not None
            # Tiles of one image are always decoded together: the image must be opened anyway.
            if count and first + count == tile and file is self._file(sequence, first) and has_room:
                runs[-1] = (first, count + 1)
            else:
                runs.append((tile, 1))
        return runs

    def _file(self, sequence: int, tile: int) -> _File:
        """The file of a tile."""
        files = self._sequences[sequence]
        return files[bisect_right(files, tile, key=lambda file: file.first) - 1]

    def _go_on(self, queue: _Queue, ended: int = 0) -> None:
        """Start the next jobs of a sequence, of which `ended` have just ended."""
        with self._lock:
            queue.under_way -= ended
            while queue.waiting and queue.under_way < SHARE:
                queue.under_way += 1
                self._pool.submit(self._work, queue, *queue.waiting.popleft())

    def _work(
        self, queue: _Queue, run: Future[np.ndarray], file: _File, first: int, count: int
    ) -> None:
        try:
            if run.set_running_or_notify_cancel():
                tiles = range(first - file.first, first - file.first + count)
                run.set_result(
                    self.readers.decode(file.shared, file.medium, name=file.name, tiles=tiles)
                )
        except BaseException as error:  # raised where the tiles are taken
            run.set_exception(error)
        finally:
            self._go_on(queue, ended=1)
