"""Copies of remote shards in a local folder of bounded size, shared by all processes of a
machine."""

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

CHUNK = 16 << 20  # bytes of a shard copied at once
PAUSE = 0.1  # seconds until a process looks again for room that others write to


class _File(NamedTuple):
    path: Path
    used: int  # when, in ns
    size: int


class ShardCache:
    """Whole copies of shards; those used least recently go first.

    A copy being written is a `.partial` of the final size, which so is reserved. Its writer holds
    the lock of its name, which the kernel frees when the process dies. Files are reserved, finished
    and evicted under the lock `room` alone.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def open(self, shard: UPath, *, size: int) -> int:
        """A descriptor of the copy of a shard, which is made now if need be; it can be read though
        others evict it.

        ShardError if the store does not give the shard, or one of other than `size` bytes;
        ConfigError if the folder cannot hold it.
        """
        copy = (
            self._folder
            / f"{hashlib.sha256(f'{shard} {size}'.encode()).hexdigest()[:16]}-{shard.name}"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open_copy(copy)
            if descriptor is None:
                with self._locked(copy.name):
                    descriptor = _open_copy(copy)  # another process was faster
                    if descriptor is None:
                        descriptor = self._make(copy, shard, size)
            return descriptor
        except OSError as error:
            raise self._refusal(shard, size, error) from error

    def _make(self, copy: Path, shard: UPath, size: int) -> int:
        with _failures_of(shard):
            check_size(shard, file_size(shard), size)
        partial = copy.with_name(f"{copy.name}.partial")
        partial.unlink(missing_ok=True)  # its writer died, since its lock is held here
        try:
            while not self._reserve(partial, size):
                time.sleep(PAUSE)
            _fill(partial, shard, size)
            with self._locked("room"):  # no eviction until it is open
                partial.rename(copy)
                return os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int) -> bool:
        """Evicts what must go and makes the file; False while what others write leaves no room."""
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
                file.path.unlink(missing_ok=True)  # who reads it keeps it open
                excess -= file.size
            with open(partial, "wb") as made:
                made.truncate(size)
            return True

    def _remove_abandoned(self) -> None:
        for partial in self._folder.glob("*.partial"):
            with self._locked(partial.stem, wait=False) as is_abandoned:
                if is_abandoned:
                    partial.unlink(missing_ok=True)

    def _files(self, suffix: str) -> Iterator[_File]:
        for path in self._folder.glob(f"*{suffix}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # a writer failed
                continue
            yield _File(path, status.st_mtime_ns, status.st_size)

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Holds a lock of the folder; False, without it, if another holds it and `wait` is off."""
        with open(self._folder / f".{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
    """A descriptor of a copy, used now; None if it is not there."""
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
        # since its size is right from the start: a machine that stops must leave no holes
        os.fsync(file.fileno())


@contextmanager
def _failures_of(shard: UPath) -> Iterator[None]:
    """Failures of the store as ShardError: all samples of a shard that cannot be copied are lost,
    none is damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise ShardError(f"{shard}: cannot open the shard: it is not there") from error
    except OSError as error:
        raise ShardError(f"{shard}: cannot copy the shard: {error}") from error
