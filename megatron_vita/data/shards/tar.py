"""Shards: plain webdataset `.tar` files, written reproducibly, read by byte offset.

A sample is `{key}.json` (messages, names of its media members, perhaps an id) with
`{key}.image0.png`, ..., `{key}.video0.mp4`, ... beside it, the media files unchanged.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from megatron_vita.data.samples.rows import Member
from megatron_vita.errors import DataError
from megatron_vita.files import atomic_write

MEMBER_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
META_NAME = re.compile(r"__[^/]*__($|/)")
MEDIA_KINDS = ("image", "video")


class ShardMedia(NamedTuple):
    """A medium to be stored: its suffix (`.png`, with the dot) and its bytes."""

    suffix: str
    data: bytes


class SampleWriter:
    """Writer of one shard, which gets its name when the `with` block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # Imported here, since it imports torch, which takes longer than most commands.
        from webdataset import TarWriter

        partial = self._stack.enter_context(atomic_write(self._path))
        file = self._stack.enter_context(open(partial, "wb"))
        # No owner and no time, so that the same samples give the same bytes.
        tar = TarWriter(file, encoder=False, user="", group="", mtime=0)
        self._tar = self._stack.enter_context(closing(tar))
        return self

    def write(
        self, key: str, *, record: dict[str, Any], media: dict[str, list[ShardMedia]]
    ) -> None:
        """Add a sample.

        Args:
            key: key of the sample.
            record: its JSON without media names.
            media: its files by kind, in order.
        """
        files: dict[str, bytes] = {}
        names: dict[str, list[str]] = {}
        for kind in MEDIA_KINDS:
            members = [f"{kind}{i}{file.suffix}" for i, file in enumerate(media.get(kind, []))]
            files |= dict(zip(members, (file.data for file in media.get(kind, [])), strict=True))
            names[f"{kind}s"] = [f"{key}.{member}" for member in members]
        text = json.dumps(record | names, ensure_ascii=False, sort_keys=True)
        self._tar.write({"__key__": key, "json": text.encode(errors="surrogatepass"), **files})

    def __exit__(
        self,
        error_type: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._stack.__exit__(error_type, error, trace)


class ScannedSample(NamedTuple):
    """A sample by the headers of a shard: its members by name; `fault`: why it cannot be used, or
    ""."""

    key: str
    members: dict[str, Member]
    fault: str = ""


def scan_shard(path: Path) -> Iterator[ScannedSample]:
    """Yield the samples of a shard in file order, from the tar headers alone.

    Consecutive members with one key are a sample. As in webdataset, the key is the path up to the
    first dot of the file's name.

    Raises:
        DataError: the tar is damaged or cut short; raised after the samples that are complete.
    """
    keys: set[str] = set()
    pending: ScannedSample | None = None
    try:
        with tarfile.open(path, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in _headers(tar, path.stat().st_size):
                # As webdataset does, skip names in double underscores, which are metadata.
                if (
                    (match := MEMBER_NAME.fullmatch(info.name)) is None
                    or META_NAME.match(info.name)
                    or info.isdir()
                ):
                    continue
                if pending is None or match[1] != pending.key:
                    if pending is not None:
                        yield pending
                    pending = ScannedSample(match[1], {}, _fault_of_key(match[1], keys))
                    keys.add(match[1])
                fault = pending.fault or _fault_of_member(info, pending.members)
                pending.members[info.name] = Member(info.name, info.offset_data, info.size)
                pending = pending._replace(fault=fault)
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
        RecursionError,
        EOFError,
    ) as error:
        behind = ""
        if pending:
            behind = f" at sample {pending.key!r:.200}"
        raise DataError(
            f"{path}: not a readable .tar shard: {error}{behind}; what follows is lost"
        ) from error
    if pending is not None:
        yield pending


def _headers(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar of `size` bytes; raises ReadError unless it ends with zeros."""
    before = -1
    while (info := tar.next()) is not None:
        # A damaged size may lead back, or beyond the end of the file.
        if not before < tar.offset <= size or info.size < 0:
            raise tarfile.ReadError(
                f"the header at byte {info.offset} says that the member has {info.size} bytes"
            )
        before = tar.offset
        # tarfile keeps every header, which would add up over a large shard.
        tar.members = []  # type: ignore[attr-defined]
        yield info
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
    # tarfile takes a damaged header or the end of a file for the end of the archive, which is two
    # blocks of zeros.
    if not end:
        raise tarfile.ReadError("it is cut short")
    if end != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def _fault_of_key(key: str, earlier: set[str]) -> str:
    if key in earlier:
        return "an earlier sample of the shard has the same key"
    if key.startswith("/") or ".." in key.split("/"):
        return "its key leads out of the folder in which the shard would be unpacked"
    if any("\ud800" <= character <= "\udfff" for character in key):
        return "its key is not UTF-8"
    return ""


def _fault_of_member(info: tarfile.TarInfo, members: dict[str, Member]) -> str:
    if not info.isreg() or info.sparse is not None:
        return f"{info.name!a:.200} is a link, a device or sparse: a plain file is needed"
    if info.name in members:
        return f"two members are called {info.name!a:.200}"
    return ""
