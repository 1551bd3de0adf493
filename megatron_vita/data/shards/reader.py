"""Reading of shard members by offset: of local shards, remote ones, and their local copies."""

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from megatron_vita.data.samples.rows import Member
from megatron_vita.data.shards.cache import ShardCache
from megatron_vita.data.shards.storage import (
    Location,
    check_size,
    file_size,
    is_remote,
    read_range,
)
from megatron_vita.errors import DataError, ShardError, VitaError

# Buffer of members read in parts: larger for remote ones, since each read is a request.
NEAR_BUFFER = 1 << 17
FAR_BUFFER = 1 << 22


class ShardReader:
    """Reader that keeps recently used shards open; with a `cache`, remote shards are read from
    copies."""

    def __init__(self, *, cache: ShardCache | None = None, max_open: int = 64) -> None:
        self._cache = cache
        self._max_open = max_open
        self._files: OrderedDict[Location, int] = OrderedDict()
        # One request for each shard, not for each read.
        self._check_remote = lru_cache(maxsize=4096)(_check_remote)

    def read(self, shard: Location, *, member: Member, shard_size: int) -> bytes:
        """Read the bytes of a member.

        Raises:
            ShardError: the shard is gone or does not have the `shard_size` bytes of its index.
            DataError: the bytes cannot be read.
        """
        if not isinstance(shard, Path) and self._cache is None:
            return self._read_remote(shard, member, shard_size)
        return self._read_local(shard, member, shard_size)

    @contextmanager
    def open(self, shard: Location, *, member: Member, shard_size: int) -> Iterator[IO[bytes]]:
        """Open a member as a file that reads only requested parts.

        Read errors inside the block are raised again at its end: a decoder would take them for
        damage of the file and replace frames.

        Raises:
            ShardError, DataError: as `read`.
        """
        # Reading no bytes opens and checks the shard: a missing one is reported before decoding.
        self.read(shard, member=Member(member.name, member.offset, 0), shard_size=shard_size)
        buffer = NEAR_BUFFER
        if not isinstance(shard, Path) and self._cache is None:
            buffer = FAR_BUFFER
        file = _MemberFile(self, shard, member, shard_size)
        try:
            yield io.BufferedReader(file, buffer)
        except Exception:
            # An error of the decoder that follows a failed read is only its consequence.
            if file.failure is None:
                raise
        if file.failure is not None:
            raise file.failure

    def _read_remote(self, shard: Location, member: Member, shard_size: int) -> bytes:
        assert not isinstance(shard, Path)
        try:
            self._check_remote(shard, shard_size)
            if member.size:
                return read_range(shard, member.offset, member.offset + member.size)
            return b""
        except FileNotFoundError as error:
            raise ShardError(f"{shard}: cannot open the shard: it is not there") from error
        except OSError as error:
            raise DataError(f"{shard}: cannot read {member.name}: {error}") from error

    def _read_local(self, shard: Location, member: Member, shard_size: int) -> bytes:
        descriptor = self._open(shard, shard_size)
        try:
            data = os.pread(descriptor, member.size, member.offset)
        except OSError as error:
            raise DataError(f"{shard}: cannot read {member.name}: {error.strerror}") from error
        if len(data) != member.size:
            raise DataError(
                f"{shard}: {member.name} has {len(data)} of {member.size} bytes: the shard is cut "
                "short"
            )
        return data

    def _open(self, shard: Location, shard_size: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            if is_remote(shard):
                # The cache evicts by time of use, which is kept in the file's times.
                os.utime(self._files[shard])
            return self._files[shard]
        descriptor = self._open_anew(shard, shard_size)
        self._close_evicted()
        # A shard that was replaced after its index was made is mostly of another size.
        try:
            check_size(shard, os.fstat(descriptor).st_size, shard_size)
        except ShardError:
            os.close(descriptor)
            raise
        self._files[shard] = descriptor
        if len(self._files) > self._max_open:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _open_anew(self, shard: Location, shard_size: int) -> int:
        if not isinstance(shard, Path):
            assert self._cache is not None
            return self._cache.open(shard, size=shard_size)
        try:
            return os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{shard}: cannot open the shard: {error.strerror}") from error

    def _close_evicted(self) -> None:
        """Close copies that the cache has evicted: open files occupy disk that counts as free."""
        for shard, descriptor in list(self._files.items()):
            if is_remote(shard) and not os.fstat(descriptor).st_nlink:
                os.close(self._files.pop(shard))

    def close(self) -> None:
        """Close every open shard."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._cache, self._max_open)

    def __del__(self) -> None:
        self.close()


class _MemberFile(io.RawIOBase):
    """Raw file object of a shard's member."""

    def __init__(
        self, reader: ShardReader, shard: Location, member: Member, shard_size: int
    ) -> None:
        self._reader = reader
        self._shard = shard
        self._member = member
        self._shard_size = shard_size
        self._position = 0
        self.failure: VitaError | None = None  # the first

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readall(self) -> bytes:
        rest = bytearray(max(self._member.size - self._position, 0))
        self.readinto(rest)
        return bytes(rest)

    def readinto(self, buffer: Any, /) -> int:
        size = max(min(len(buffer), self._member.size - self._position), 0)
        if size:
            part = Member(self._member.name, self._member.offset + self._position, size)
            try:
                buffer[:size] = self._reader.read(
                    self._shard, member=part, shard_size=self._shard_size
                )
            except VitaError as error:
                self.failure = self.failure or error
                raise
            self._position += size
        return size


def _rebuild(cache: ShardCache | None, max_open: int) -> ShardReader:
    return ShardReader(cache=cache, max_open=max_open)


def _check_remote(shard: Location, planned: int) -> None:
    check_size(shard, file_size(shard), planned)
