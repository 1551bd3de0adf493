"""Reads members of shards by offset: local ones, remote ones, and local copies of remote ones."""

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from megatron_vita.data.shards.cache import ShardCache
from megatron_vita.data.shards.storage import (
    Location,
    check_size,
    file_size,
    is_remote,
    read_range,
)
from megatron_vita.data.shards.tar import Member
from megatron_vita.errors import DataError, ShardError, VitaError

# bytes read at once of a file that is read part by part
NEAR_BUFFER = 1 << 17
FAR_BUFFER = 1 << 22


class ShardReader:
    """Keeps the local shards, or copies, of the latest reads open. With a `cache`, copies of remote
    ones are read."""

    def __init__(self, *, cache: ShardCache | None = None, max_open: int = 64) -> None:
        self._cache = cache
        self._max_open = max_open
        self._files: OrderedDict[Location, int] = OrderedDict()
        self._check_remote = lru_cache(maxsize=4096)(_check_remote)

    def read(self, shard: Location, *, member: Member, shard_size: int) -> bytes:
        """The bytes of `member`. ShardError if the shard is gone or has not the `shard_size` bytes
        of its index; DataError if they cannot be read.
        """
        if not isinstance(shard, Path) and self._cache is None:
            return self._read_remote(shard, member, shard_size)
        return self._read_local(shard, member, shard_size)

    @contextmanager
    def open(self, shard: Location, *, member: Member, shard_size: int) -> Iterator[IO[bytes]]:
        """`member` as a file, of which only what is asked for is read and held. Raises as `read`
        does, in the end also
        what went wrong in between: decoders take it for damage to the file, and show frames in
        place of others.
        """
        self.read(shard, member=Member(member.name, member.offset, 0), shard_size=shard_size)
        is_far = not isinstance(shard, Path) and self._cache is None
        file = _MemberFile(self, shard, member, shard_size)
        try:
            yield io.BufferedReader(file, FAR_BUFFER if is_far else NEAR_BUFFER)
        except Exception:
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
                f"{shard}: {member.name} has {len(data)} of {member.size} bytes: the shard is cut short"
            )
        return data

    def _open(self, shard: Location, shard_size: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            if is_remote(shard):
                # for the cache, which drops what was used least recently
                os.utime(self._files[shard])
            return self._files[shard]
        descriptor = self._open_anew(shard, shard_size)
        self._close_evicted()
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
        """Closes copies that the cache has dropped: while they are open, they take disk that it
        counts as free."""
        for shard, descriptor in list(self._files.items()):
            if is_remote(shard) and not os.fstat(descriptor).st_nlink:
                os.close(self._files.pop(shard))

    def close(self) -> None:
        """Closes every open shard."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._cache, self._max_open)

    def __del__(self) -> None:
        self.close()


class _MemberFile(io.RawIOBase):
    """A member of a shard, read part by part."""

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
