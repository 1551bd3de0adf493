"""Storage of shards: local disks or, through fsspec, object stores.

A name with a scheme (`s3://bucket/mix/*.tar`) is remote. Credentials and endpoints come from the
environment, as fsspec and the store's own library read them.
"""

import glob
from pathlib import Path

import fsspec
from upath import UPath

from megatron_vita.errors import ConfigError, DataError, ShardError
from megatron_vita.media.files import is_hidden
from megatron_vita.stores import with_retries

Location = Path | UPath


def is_remote(location: Location) -> bool:
    """Return true if a file is in an object store."""
    return not isinstance(location, Path)


def find_files(pattern: str) -> list[Location]:
    """Find the files that match a glob; hidden files match only by their full name.

    Raises:
        ConfigError: the scheme is unknown, or the store cannot be listed.
    """
    if "://" not in pattern:
        return [Path(path) for path in glob.glob(pattern, recursive=True)]
    try:
        store, inner = fsspec.core.url_to_fs(pattern)
        return [
            UPath(store.unstrip_protocol(path))
            for path in with_retries(lambda: store.glob(inner), pattern)
            # Unlike Python's, the globs of fsspec match hidden files.
            if path == inner or not is_hidden(path.rpartition("/")[2])
        ]
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{pattern}: cannot be listed: {error}") from error


def read_range(location: UPath, start: int, stop: int) -> bytes:
    """Read bytes `start` to `stop` of a remote file, with retries; raises OSError in the end."""

    def read() -> bytes:
        data = location.fs.cat_file(location.path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} of {stop - start} bytes came")
        return data

    return with_retries(read, str(location))


def read_file(location: UPath) -> bytes:
    """Read all of a remote file, as `read_range`."""
    return with_retries(lambda: location.fs.cat_file(location.path), str(location))


def read_tail(location: UPath, size: int) -> bytes:
    """Read the last `size` bytes of a remote file, or all of a shorter one, as `read_range`."""
    whole = file_size(location)
    return read_range(location, max(0, whole - size), whole)


def file_size(location: Location) -> int:
    """Size of a file in bytes; raises OSError if it does not exist."""
    if isinstance(location, Path):
        return location.stat().st_size
    return with_retries(lambda: int(location.fs.info(location.path)["size"]), str(location))


def check_size(shard: Location, found: int, planned: int) -> None:
    """Raise ShardError unless a shard has the size that its index states."""
    if found != planned:
        raise ShardError(
            f"{shard}: the shard has {found} bytes, its index was made of one with {planned}: "
            "make the index again with vita data index"
        )


def refuse_remote(location: Location, what: str) -> Path:
    """Return the path of a local file; raises DataError, naming the operation `what`, for a remote
    one."""
    if not isinstance(location, Path):
        raise DataError(
            f"{location}: {what} needs shards on a local disk; do it before they are uploaded"
        )
    return location
