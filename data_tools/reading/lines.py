"""Lines of JSONL files, one sample each, divided into ranges of equal size."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.reading.compressed import refuse_compressed
from megatron_vita.errors import DataError


class Line(NamedTuple):
    """A non-empty line of a JSONL file; `number` counts all lines from 1."""

    file: Path
    number: int
    text: bytes


class LineRange(NamedTuple):
    """A range of `lines` non-empty lines from byte `offset`, the beginning of line `number`."""

    file: Path
    offset: int
    number: int
    lines: int


def read_lines(files: list[Path]) -> Iterator[Line]:
    """Yield the non-empty lines of JSONL files; raises DataError if a file cannot be read."""
    for path in files:
        for _, line in _lines_from(path, offset=0, number=1):
            yield line


def divide_lines(files: list[Path], *, size: int) -> Iterator[list[LineRange]]:
    """Divide the non-empty lines of files into runs of `size`, which may span several files.

    Raises:
        DataError: a file cannot be read.
    """
    # Offsets instead of lines: a worker reads its lines itself, and the list stays small.
    run: list[LineRange] = []
    for path in files:
        for offset, line in _lines_from(path, offset=0, number=1):
            if not run or run[-1].file != path:
                run.append(LineRange(path, offset, line.number, 0))
            run[-1] = run[-1]._replace(lines=run[-1].lines + 1)
            if sum(line_range.lines for line_range in run) == size:
                yield run
                run = []
    if run:
        yield run


def read_ranges(ranges: list[LineRange]) -> Iterator[Line]:
    """Yield the lines of a run."""
    for file, offset, number, lines in ranges:
        for place, (_, line) in enumerate(_lines_from(file, offset=offset, number=number), start=1):
            yield line
            if place == lines:
                break


def _lines_from(path: Path, *, offset: int, number: int) -> Iterator[tuple[int, Line]]:
    refuse_compressed(path, (".jsonl", ".json"))
    try:
        with open(path, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 16) as file:
            file.seek(offset)
            for place, text in enumerate(file, start=number):
                # Empty lines are counted, since editors count them, but are no samples.
                if text.strip():
                    yield offset, Line(path, place, text)
                offset += len(text)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error
