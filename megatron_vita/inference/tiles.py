"""Tiles of prompts: decoded on the rank that encodes them, a step ahead where that can be known."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_vita.data.form import Medium
from megatron_vita.data.shared_memory import SharedFile
from megatron_vita.errors import DataError
from megatron_vita.inference.media_readers import MediaReaders
from megatron_vita.inference.step import SequenceStart

DECODERS = min(16, os.cpu_count() or 1)
"""Runs of tiles that are decoded at a time."""
_FEWEST, _MOST = 8, 64
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


class TileDecoder:
    """Has runs of tiles of the sequences under way decoded."""

    def __init__(self, readers: MediaReaders) -> None:
        self.readers = readers
        self._sequences: dict[int, list[_File]] = {}
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="tiles")
        self._ahead: dict[tuple[int, int, int], Future[np.ndarray]] = {}

    def add(self, start: SequenceStart) -> None:
        """A sequence whose tiles will be asked for."""
        firsts = accumulate((medium.num_tiles for medium in start.media), initial=0)
        self._sequences[start.sequence] = [
            _File(file.name, medium, first, SharedFile(file.data))
            for file, medium, first in zip(start.files, start.media, firsts, strict=False)
        ]

    def forget(self, sequence: int) -> None:
        """A sequence whose tiles will not be asked for any longer."""
        if self._sequences.pop(sequence, None) is None:
            return
        for key in [key for key in self._ahead if key[0] == sequence]:
            self._ahead.pop(key).cancel()

    def prefetch(self, tiles: Sequence[TileKey]) -> None:
        """Begins to decode tiles that will probably be asked for in the same order."""
        for run in self._runs(tiles):
            if run not in self._ahead:
                self._ahead[run] = self._pool.submit(self._decode, self._file(*run[:2]), *run[1:])

    def decode(self, tiles: Sequence[TileKey]) -> tuple[np.ndarray, dict[int, str]]:
        """Pixels uint8 [n, 3, S, S], black where they cannot be had, and what is wrong with which sequence."""
        size = self.readers.form.size
        parts, failed = [np.zeros((0, 3, size, size), dtype=np.uint8)], {}
        runs = self._runs(tiles)
        self.prefetch(tiles)
        for run in runs:
            sequence, _, count = run
            try:
                parts.append(self._ahead.pop(run).result())
            except DataError as error:
                failed[sequence] = str(error)
                parts.append(np.zeros((count, 3, size, size), dtype=np.uint8))
        return np.concatenate(parts), failed

    def _runs(self, tiles: Sequence[TileKey]) -> list[tuple[int, int, int]]:
        """(sequence, first tile, number) of tiles that follow one another in one medium."""
        most = min(max(-(-len(tiles) // DECODERS), _FEWEST), _MOST)
        runs: list[tuple[int, int, int]] = []
        for sequence, tile in tiles:
            last = runs[-1] if runs else (-1, 0, 0)
            follows = last[0] == sequence and last[1] + last[2] == tile and last[2] < most
            if follows and self._file(sequence, tile) is self._file(sequence, last[1]):
                runs[-1] = (sequence, last[1], last[2] + 1)
            else:
                runs.append((sequence, tile, 1))
        return runs

    def _file(self, sequence: int, tile: int) -> _File:
        """The file of a tile."""
        files = self._sequences[sequence]
        return files[bisect_right(files, tile, key=lambda file: file.first) - 1]

    def _decode(self, file: _File, first: int, count: int) -> np.ndarray:
        tiles = range(first - file.first, first - file.first + count)
        return self.readers.decode(file.shared, file.medium, name=file.name, tiles=tiles)
