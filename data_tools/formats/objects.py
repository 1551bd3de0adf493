"""Objects of JSON files: one array, read in parts whatever its length, or one object per line."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.formats.base import Candidate, refuse
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.errors import DataError

HEAD = 4096
BOM = b"\xef\xbb\xbf"
CHUNK = 1 << 18
# A missing quote or bracket would collect the rest of the file in memory.
MAX_ITEM = 1 << 30
OUTSIDE = re.compile(rb'["\[\]{},]')
IN_STRING = re.compile(rb'["\\]')


def read_objects(
    path: Path, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Candidate]:
    """Yield a candidate for each object of a file, built by `make`.

    Raises:
        DataError: an array is malformed, or the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            start = 0
            if head.startswith(BOM):
                start = len(BOM)
            file.seek(start)
            if head[start:].lstrip().startswith(b"["):
                found = _array_items(file, path)
            else:
                found = _lines(file)
            for place, item, position in found:
                yield Candidate(place, _maker(item, make), position)
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error


def _array_items(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any, int]]:
    read = 0
    try:
        for read, text in enumerate(_split_array(file), start=1):
            yield f"object {read}", _parsed(text), file.tell()
    except DataError as error:
        where = f"after object {read}" if read else "before its first object"
        raise DataError(f"{path}: the JSON array is malformed {where}: {error}") from error


def _split_array(file: BinaryIO) -> Iterator[bytes]:
    """Yield the text of each item of an array, which need not be valid JSON.

    Raises:
        DataError: the array does not end.
    """
    depth = 0
    quoted = False
    skip = 0
    item = bytearray()
    for chunk in iter(partial(file.read, CHUNK), b""):
        start = 0
        position = skip
        # Only characters that change depth or quoting are visited, which is much faster than a
        # loop over all bytes.
        while match := _marks(quoted).search(chunk, position):
            position = match.end()
            mark = match[0]
            if mark == b"\\":
                # Skip the escaped character, which may be in the next chunk.
                position += 1
            elif mark == b'"':
                quoted = not quoted
            elif mark in b"[{":
                depth += 1
                if depth == 1:
                    start = position
            elif mark in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and mark == b","):
                item += chunk[start : position - 1]
                if item.strip() or depth:
                    yield bytes(item)
                item.clear()
                start = position
                if depth == 0:
                    _check_end(chunk[position:] + file.read(CHUNK))
                    return
        skip = max(position - len(chunk), 0)
        item += chunk[start:]
        if len(item) > MAX_ITEM:
            raise DataError(f"an object of more than {MAX_ITEM} bytes")
    raise DataError("the file ends within it")


def _marks(quoted: bool) -> re.Pattern[bytes]:
    if quoted:
        return IN_STRING
    return OUTSIDE


def _check_end(rest: bytes) -> None:
    if rest.strip():
        raise DataError(f"{rest.strip()[:20]!r} follows its end")


def _lines(file: BinaryIO) -> Iterator[tuple[str, Any, int]]:
    position = file.tell()
    for number, text in enumerate(file, start=1):
        position += len(text)
        if text.strip():
            yield f"line {number}", _parsed(text), position


def _parsed(text: bytes) -> Any:
    """Parse a JSON text; returns the DataError if it is invalid."""
    try:
        return parse_json(text)
    except DataError as error:
        return error


def _maker(
    item: Any, make: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[], dict[str, Any]]:
    if isinstance(item, dict):
        return partial(make, item)
    if isinstance(item, DataError):
        return refuse(str(item))
    return refuse(f"a {type(item).__name__}, not a JSON object")
