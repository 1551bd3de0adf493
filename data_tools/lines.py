"""Lines of JSONL files, one sample each, dealt in runs of equal number."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.compressed import refuse_compressed
from megatron_vita.errors import DataError


class Line(NamedTuple):
    """A line of a JSONL file; `number` counts from 1. Empty lines count, but are no samples."""

    file: Path
    number: int
    text: bytes


class Stretch(NamedTuple):
    """`lines` lines of a file that are not empty: from byte `offset` on, where line number `number`
    begins."""

    file: Path
    offset: int
    number: int
    lines: int


def read_lines(files: list[Path]) -> Iterator[Line]:
    """The lines of JSONL files that are not empty. DataError if a file cannot be read."""
    for path in files:
        for _, line in _lines_from(path, offset=0, number=1):
            yield line


def divide_lines(files: list[Path], *, size: int) -> Iterator[list[Stretch]]:
    """The lines that are not empty in runs of `size`, which may begin in one file and end in
    another.

    DataError if a file cannot be read.
    """
    run: list[Stretch] = []
    for path in files:
        for offset, line in _lines_from(path, offset=0, number=1):
            if not run or run[-1].file != path:
                run.append(Stretch(path, offset, line.number, 0))
            run[-1] = run[-1]._replace(lines=run[-1].lines + 1)
            if sum(stretch.lines for stretch in run) == size:
                yield run
                run = []
    if run:
        yield run


def read_stretches(stretches: list[Stretch]) -> Iterator[Line]:
    """The lines of a run."""
    for file, offset, number, lines in stretches:
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
                if text.strip():
                    yield offset, Line(path, place, text)
                offset += len(text)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error
