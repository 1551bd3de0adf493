"""Packs that a run leaves out after rollbacks, durable beside its checkpoints.

The file has a line for each rollback: the faulty step, the first pack that is left out, and the one
after the last, from 0.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_vita.config.run_files import SKIPPED_PACKS
from megatron_vita.errors import DataError
from megatron_vita.files import append_json_lines, complete_lines


class SkippedRange(NamedTuple):
    """Packs from `start` up to `stop`, which is not among them, left out for a faulty step."""

    step: int
    start: int
    stop: int


class SkippedPacks:
    """The ranges of a run, each of which counts once however often it was noted."""

    def __init__(self, ranges: Iterable[SkippedRange] = ()) -> None:
        self._ranges: list[SkippedRange] = []
        for skipped in ranges:
            self.add(skipped)

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[SkippedRange]:
        """Iterate over the ranges that are left out."""
        return iter(self._ranges)

    def add(self, skipped: SkippedRange) -> None:
        """Leave out another range.

        Raises:
            ValueError: it is empty, or begins before the first pack.
        """
        if not 0 <= skipped.start < skipped.stop:
            raise ValueError(
                f"packs {skipped.start} to {skipped.stop}: the range is empty or negative; start must be "
                "below stop"
            )
        if skipped not in self._ranges:
            self._ranges.append(skipped)
            self._ranges.sort(key=lambda known: known.start)

    def next_first(self, consumed: int, *, size: int) -> int:
        """Return the first pack of the step that follows once `consumed` packs are done with.

        size: packs of a step. One that would have a pack of a range begins after it; if the batch
            size has changed since, up to `size` - 1 packs before the range are left out, too.
        """
        for _, start, stop in self._ranges:
            if consumed < stop and start < consumed + size:
                consumed = stop
        return consumed

    def consumed_after(self, consumed: int, *, steps: int, size: int) -> int:
        """Return the packs that are done with after `steps` more steps of `size` packs."""
        firsts = self.firsts(consumed, steps=steps, size=size)
        return firsts[-1] + size if firsts else consumed

    def firsts(self, consumed: int, *, steps: int, size: int) -> list[int]:
        """Return the first pack of each of the `steps` steps of `size` packs that follow."""
        found = []
        for _ in range(steps):
            found.append(self.next_first(consumed, size=size))
            consumed = found[-1] + size
        return found


def read_skipped(folder: str | Path) -> SkippedPacks:
    """Read what rollbacks of a run have left out.

    folder: that the run saves to; empty: none, where nothing can be left out.

    Raises:
        DataError: a line is none of such a file.
    """
    if not folder:
        return SkippedPacks()
    path = Path(folder) / SKIPPED_PACKS
    try:
        return SkippedPacks(SkippedRange(**json.loads(line)) for line in complete_lines(path))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a list of packs left out by rollbacks: {error}") from error


def write_skipped(folder: Path, skipped: SkippedRange) -> None:
    """Add a range to the file, durably."""
    append_json_lines(folder / SKIPPED_PACKS, [skipped._asdict()])
