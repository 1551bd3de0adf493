"""Shards: plain webdataset `.tar` files, written with the same bytes for the same samples, read by byte offset.

A sample is `{key}.json` (messages, names of its media members, perhaps an id) with `{key}.image0.png`, ...,
`{key}.video0.mp4`, ... beside it, the media bytes as they were found.
"""

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from webdataset import TarWriter

from megatron_vita.errors import DataError, ShardError

MEDIA_KINDS = ("image", "video")


class Member(NamedTuple):
    """Where a file's bytes lie in a shard."""

    name: str
    offset: int
    size: int


class MediaFile(NamedTuple):
    """A medium to be stored: its suffix (`.png`, with the dot) and its bytes."""

    suffix: str
    data: bytes


class SampleWriter:
    """Writes one shard under a temporary name; leaving the `with` block without an error gives it its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")

    def __enter__(self) -> Self:
        self._file = open(self._partial, "wb")
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mtime=0)
        return self

    def write(self, key: str, *, record: dict[str, Any], media: dict[str, list[MediaFile]]) -> None:
        """Adds a sample. `record` is its JSON without media names; `media` holds the files by kind, in order."""
        files: dict[str, bytes] = {}
        names: dict[str, list[str]] = {}
        for kind in MEDIA_KINDS:
            members = [f"{kind}{i}{file.suffix}" for i, file in enumerate(media.get(kind, []))]
            files |= dict(zip(members, (file.data for file in media.get(kind, [])), strict=True))
            names[f"{kind}s"] = [f"{key}.{member}" for member in members]
        text = json.dumps(record | names, ensure_ascii=False, sort_keys=True)
        self._tar.write({"__key__": key, "json": text.encode(errors="surrogatepass"), **files})

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self._tar.close()
        self._file.close()
        if error_type is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink()


def scan_shard(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Each sample's key and members by name, in file order, from the tar headers. DataError if the tar is damaged."""
    key, members = "", dict[str, Member]()
    _check_end(path)
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                if (name := info.name).split(".", 1)[0] != key:
                    if members:
                        yield key, members
                    key, members = name.split(".", 1)[0], {}
                members[name] = Member(name, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a readable .tar shard: {error}; write it again with data_tools shard") from error
    if members:
        yield key, members


def _check_end(path: Path) -> None:
    """DataError unless the file ends as a tar does, with 1024 zero bytes: tarfile takes a cut one for a shorter one."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1024, 0))
            whole = file.read() == bytes(1024)
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
    if not whole:
        raise DataError(f"{path}: not a readable .tar shard: it is cut short; write it again with data_tools shard")


class ShardReader:
    """Reads members of shards by offset, keeping the shards of the latest reads open."""

    def __init__(self, *, max_open: int = 64) -> None:
        self._max_open = max_open
        self._files: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, *, member: Member, shard_size: int) -> bytes:
        """The bytes of `member`. ShardError if the shard is gone or has not the `shard_size` bytes of its index."""
        descriptor = self._open(path, shard_size)
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) != member.size:
            raise DataError(f"{path}: {member.name} has {len(data)} of {member.size} bytes: the shard is cut short")
        return data

    def _open(self, path: Path, shard_size: int) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot open the shard: {error.strerror}") from error
        if (size := os.fstat(descriptor).st_size) != shard_size:
            os.close(descriptor)
            raise ShardError(
                f"{path}: the shard has {size} bytes, its index was made of one with {shard_size}: "
                "make the index again with data_tools index"
            )
        self._files[path] = descriptor
        if len(self._files) > self._max_open:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Closes every open shard."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_max_open": self._max_open, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()
