"""Files that survive kills and power failures: atomic writes, and JSONL files that grow.

Every write here has the same promise: when the function returns, the content is on disk; until
then, a reader sees the old file or none, never a part of the new one.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` at the end of the block.

    On an error the temporary file is removed. A kill leaves it (`NAME.partial`) to be overwritten
    by the next attempt.

    concurrent: several processes may write the file at a time, each a temporary one of its own
        (`NAME.HEX.partial`); the last one to end wins.
    """
    suffix = f".{secrets.token_hex(4)}.partial" if concurrent else ".partial"
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        sync(partial)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(source: Path, target: Path) -> None:
    """Rename a synced file or folder to its final name, durably."""
    os.replace(source, target)
    # The new name is part of the folder, which a power failure could leave as it was.
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json_lines(
    path: Path, entries: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = True
) -> None:
    """Write a JSONL file atomically."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(_lines(entries, ensure_ascii))


def append_json_lines(
    path: Path, entries: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = True
) -> None:
    """Append entries to a JSONL file durably, after removing a torn last line."""
    with open(path, "ab+") as file:
        _cut_torn_line(file.fileno())
        file.writelines(line.encode() for line in _lines(entries, ensure_ascii))
        file.flush()
        os.fsync(file.fileno())


def complete_lines(path: Path) -> list[bytes]:
    """Lines of a JSONL file, without a last one that a kill tore; empty if there is no file."""
    if not path.exists():
        return []
    # Split at line feeds alone: JSON text may hold other line separators of Unicode.
    return path.read_bytes().split(b"\n")[:-1]


def _lines(entries: Iterable[Mapping[str, Any]], ensure_ascii: bool) -> Iterator[str]:
    for entry in entries:
        yield json.dumps(entry, ensure_ascii=ensure_ascii) + "\n"


def _cut_torn_line(descriptor: int) -> None:
    """Truncate an open file to its last line feed; what follows was torn by a kill."""
    size = os.fstat(descriptor).st_size
    # Mostly nothing is torn, which the last byte shows without reading a long file.
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        content = os.pread(descriptor, size, 0)
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)
