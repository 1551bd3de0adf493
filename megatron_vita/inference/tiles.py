"""Tiles of prompts: decoded on the rank that encodes them, a step ahead where that can be known."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megatron_vita.data.documents import decode_tiles
from megatron_vita.data.form import DocumentFormat
from megatron_vita.errors import DataError
from megatron_vita.inference.step import SequenceStart

logger = logging.getLogger(__name__)
_FRAMES_AT_ONCE = 64
"""Frames of a video that one thread decodes: it has to seek first, so fewer would waste work."""

TileKey = tuple[int, int]
"""Sequence and tile of it."""


class TileDecoder:
    """Threads that decode runs of tiles of the sequences under way."""

    def __init__(self, form: DocumentFormat) -> None:
        self.form = form
        self._sequences: dict[int, SequenceStart] = {}
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="tiles")
        self._ahead: dict[tuple[int, int, int], Future[np.ndarray]] = {}

    def add(self, start: SequenceStart) -> None:
        """A sequence whose tiles will be asked for."""
        self._sequences[start.sequence] = start

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
                self._ahead[run] = self._pool.submit(self._decode, *run)

    def decode(self, tiles: Sequence[TileKey]) -> tuple[np.ndarray, dict[int, str]]:
        """Pixels uint8 [n, 3, S, S], black where they cannot be had, and what is wrong with which sequence."""
        size = self.form.vision.image_size
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
        runs: list[tuple[int, int, int]] = []
        for sequence, tile in tiles:
            last = runs[-1] if runs else (-1, 0, 0)
            follows = last[0] == sequence and last[1] + last[2] == tile and last[2] < _FRAMES_AT_ONCE
            if follows and self._medium(sequence, tile) == self._medium(sequence, last[1]):
                runs[-1] = (sequence, last[1], last[2] + 1)
            else:
                runs.append((sequence, tile, 1))
        return runs

    def _medium(self, sequence: int, tile: int) -> int:
        ends = np.cumsum([medium.num_tiles for medium in self._sequences[sequence].media])
        return int(np.searchsorted(ends, tile, side="right"))

    def _decode(self, sequence: int, first: int, count: int) -> np.ndarray:
        start = self._sequences[sequence]
        which = self._medium(sequence, first)
        offset = first - sum(medium.num_tiles for medium in start.media[:which])
        file = start.files[which]
        try:
            return decode_tiles(
                start.media[which], file.data, name=file.name, tiles=range(offset, offset + count), form=self.form
            )
        except DataError:
            raise
        except Exception as error:
            logger.exception("%s", file.name)
            raise DataError(f"{file.name}: cannot be decoded: {type(error).__name__}: {error}") from error
