"""Files that survive kills and power failures: atomic writes, and JSONL files that grow.

Every write here has the same promise: when the function returns, the content is on disk; until
then, a reader sees the old file or none, never a part of the new one.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

_BLOCK_BYTES = 1 << 16


@contextmanager
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` at the end of the block.

    On an error the temporary file is removed. A kill leaves it to the next writer, which overwrites
    or removes it.

    Args:
        path: the file to replace, in a folder that exists.
        concurrent: several processes may write the file at a time, each a temporary one of its own
            (`NAME.HEX.partial` for `NAME.partial`); the last one to end wins.
    """
    partial = path.with_name(path.name + ".partial")
    lock: AbstractContextManager[None] = nullcontext()
    if concurrent:
        remove_abandoned([path])
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        lock = _locked(partial)
    try:
        with lock:
            yield partial
            sync(partial)
            publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a new file, by which others see that its writer lives."""
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "wb"))
            # Without locks on this file system nobody gets one, so nothing is taken for abandoned.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Before it was locked, another writer may have removed it as abandoned.
            if _is_at(path, file):
                break
        yield


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Return true if an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def remove_abandoned(paths: Collection[Path]) -> None:
    """Remove temporary files of killed writers of some paths, whose locks have ended with them.

    `atomic_write(path, concurrent=True)` does so first; a caller that finds files complete and
    writes nothing does it here. Each folder is listed once.
    """
    wanted = set(paths)
    for folder in {path.parent for path in wanted}:
        for partial in folder.glob("*.partial"):
            name = partial.name.removesuffix(".partial").rpartition(".")[0]
            if folder / name in wanted:
                _remove_if_abandoned(partial)


def _remove_if_abandoned(partial: Path) -> None:
    with suppress(OSError), open(partial, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else another has removed it, and its writer may have made it anew.
        if _is_at(partial, file):
            partial.unlink()


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
    cut_torn_line(path)
    with open(path, "ab") as file:
        file.writelines(line.encode() for line in _lines(entries, ensure_ascii))
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Truncate a file to its last line feed, if it exists; what follows was torn by a kill."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        # From the end, since a file that grew for days is long and its last line is not.
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                file.truncate(start + place + 1)
                return
            end = start
        file.truncate(0)


def complete_lines(path: Path) -> list[bytes]:
    """Lines of a JSONL file, without a last one that a kill tore; empty if there is no file."""
    if not path.exists():
        return []
    # Split at line feeds alone: JSON text may hold other line separators of Unicode.
    return path.read_bytes().split(b"\n")[:-1]


def _lines(entries: Iterable[Mapping[str, Any]], ensure_ascii: bool) -> Iterator[str]:
    for entry in entries:
        yield json.dumps(entry, ensure_ascii=ensure_ascii) + "\n"
