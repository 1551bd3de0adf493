"""Local cache of remote shards, of bounded size, shared by all processes of a host."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from upath import UPath

from megatron_vita.data.shards.storage import check_size, file_size, read_range
from megatron_vita.errors import ConfigError, ShardError

CHUNK = 16 << 20  # bytes of a shard that are copied at a time
PAUSE = 0.1  # seconds between attempts to reserve space that other writers occupy


class _CachedFile(NamedTuple):
    path: Path
    used: int  # time of last use in ns
    size: int


class ShardCache:
    """Whole copies of shards with least-recently-used eviction.

    A copy being written is a `.partial` file of the final size, which reserves its space. Its
    writer holds the lock of its name, which the kernel releases if the process dies. Files are
    reserved, completed and evicted only under the lock `room`.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def open(self, shard: UPath, *, size: int) -> int:
        """Open the copy of a shard, made now if needed; it stays readable if it is evicted.

        Raises:
            ShardError: the store does not have the shard, or it is not of `size` bytes.
            ConfigError: the folder cannot hold it.
        """
        # The digest keeps apart shards of one name, and versions of different size.
        copy = (
            self._folder
            / f"{hashlib.sha256(f'{shard} {size}'.encode()).hexdigest()[:16]}-{shard.name}"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open_copy(copy)
            if descriptor is None:
                with self._locked(copy.name):
                    # Another process may have made it while this one waited for the lock.
                    descriptor = _open_copy(copy)
                    if descriptor is None:
                        descriptor = self._make(copy, shard, size)
            return descriptor
        except OSError as error:
            raise self._refusal(shard, size, error) from error

    def _make(self, copy: Path, shard: UPath, size: int) -> int:
        with _failures_of(shard):
            check_size(shard, file_size(shard), size)
        partial = copy.with_name(f"{copy.name}.partial")
        # A file left by a writer that died: this process holds its lock.
        partial.unlink(missing_ok=True)
        try:
            while not self._reserve(partial, size):
                time.sleep(PAUSE)
            _fill(partial, shard, size)
            # Under the lock of evictions, so that the copy cannot be evicted before it is open.
            with self._locked("room"):
                partial.rename(copy)
                return os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> bool:
        """Evict old copies and create the file; false if other writers occupy the space."""
        if size > self._limit:
            raise ConfigError(
                f"data.cache_gib is {self._limit / 2**30:g}: a shard of {size} bytes does not fit"
            )
        with self._locked("room"):
            self._remove_abandoned()
            reserved = size + sum(file.size for file in self._files(".partial"))
            if reserved > self._limit:
                return False
            copies = sorted(self._files(".tar"), key=lambda file: file.used)
            excess = reserved + sum(file.size for file in copies) - self._limit
            for file in copies:
                if excess <= 0:
                    break
                # Processes that read the copy have it open, and lose nothing.
                file.path.unlink(missing_ok=True)
                excess -= file.size
            with open(partial, "wb") as made:
                made.truncate(size)
            return True

    def _remove_abandoned(self) -> None:
        for partial in self._folder.glob("*.partial"):
            with self._locked(partial.stem, wait=False) as is_abandoned:
                if is_abandoned:
                    partial.unlink(missing_ok=True)

    def _files(self, suffix: str) -> Iterator[_CachedFile]:
        for path in self._folder.glob(f"*{suffix}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # removed meanwhile by a writer that failed
                continue
            yield _CachedFile(path, status.st_mtime_ns, status.st_size)

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold a lock of the folder; yields false if another has it and `wait` is false."""
        with open(self._folder / f".{name}.lock", "w") as file:
            operation = fcntl.LOCK_EX
            if not wait:
                operation |= fcntl.LOCK_NB
            try:
                fcntl.flock(file, operation)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _refusal(self, shard: UPath, size: int, error: OSError) -> ConfigError:
        folder = self._folder.resolve()
        what = f"data.cache {folder}: cannot keep a copy of {shard}, {size} bytes: {error.strerror}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return ConfigError(what)
        disk = next(path for path in (folder, *folder.parents) if path.is_mount())
        return ConfigError(
            f"{what}; the disk at {disk} has {shutil.disk_usage(disk).free} bytes free: "
            f"free the disk, or lower data.cache_gib, which is {self._limit / 2**30:g}"
        )


def _open_copy(copy: Path) -> int | None:
    """Open a copy and mark it as used now; None if it does not exist."""
    try:
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    os.utime(descriptor)
    return descriptor


def _fill(partial: Path, shard: UPath, size: int) -> None:
    with open(partial, "r+b") as file:
        for start in range(0, size, CHUNK):
            with _failures_of(shard):
                data = read_range(shard, start, min(start + CHUNK, size))
            file.write(data)
        file.flush()
        # The file has its final size from the start: after a power failure it could have holes.
        os.fsync(file.fileno())


@contextmanager
def _failures_of(shard: UPath) -> Iterator[None]:
    """Convert failures of the store to ShardError: they concern the shard, not a single sample."""
    try:
        yield
    except FileNotFoundError as error:
        raise ShardError(f"{shard}: cannot open the shard: it is not there") from error
    except OSError as error:
        raise ShardError(f"{shard}: cannot copy the shard: {error}") from error
