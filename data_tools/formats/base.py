"""What formats have in common."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.files import is_hidden

MAGIC = (
    (b"\xff\xd8", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"\x1aE\xdf\xa3", ".mkv"),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an import is told: where media lie, where those found inside sources are written, the
    captions' question."""

    media: Path
    media_out: Path | None
    prompt: str


class Candidate(NamedTuple):
    """A sample that may be good: its place in the source, how it is made (which may be a
    DataError), and the bytes of the source up to its end, for the progress.
    """

    place: str
    make: Callable[[], dict[str, Any]]
    position: int


class Format(NamedTuple):
    """A format: the sources (files or folders) among what a user names, and the samples of a
    source.

    Reading raises DataError where the source cannot be read on.
    """

    list_sources: Callable[[list[Path]], list[Path]]
    read: Callable[[Path, Setting], Iterator[Candidate]]
    writes_media: bool = False


def refuse(reason: str) -> Callable[[], dict[str, Any]]:
    """What a Candidate that is bad is made by."""

    def make() -> dict[str, Any]:
        raise DataError(reason)

    return make


def find_files(paths: list[Path], *suffixes: str) -> list[Path]:
    """Files as they are named, and those with one of the suffixes in folders, sorted. ConfigError
    if there are none."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [file for file in walk(path) if file.name.endswith(suffixes)]
        if not inside:
            raise ConfigError(f"{path}: no file with {' or '.join(suffixes)} in this folder")
        found += inside
    return found


def walk(folder: Path) -> Iterator[Path]:
    """The files of a folder and those in it that are not hidden, in the order of their names; links
    to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(root, name) for name in sorted(names) if not is_hidden(name))


def relative_to_media(path: Path, setting: Setting) -> str:
    """The path of a file as samples name it. DataError if it lies outside the media folder."""
    try:
        return path.absolute().relative_to(setting.media.absolute()).as_posix()
    except ValueError:
        raise DataError(
            f"{path} lies outside the media folder {setting.media}: name another with --media"
        ) from None


def write_medium(data: bytes, *, source: Path, name: str, setting: Setting) -> str:
    """Writes a medium found inside a source, and gives its path as samples name it: in a folder of
    the source's own."""
    assert setting.media_out is not None
    where = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    path = Path(f"{source.name.replace('.', '_')}-{where}", f"{name}{_suffix(data)}")
    target = setting.media_out / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, target)
    return path.as_posix()


def _suffix(data: bytes) -> str:
    if data[:4] == b"RIFF":
        return ".webp" if data[8:12] == b"WEBP" else ".avi"
    if data[4:8] == b"ftyp":
        return ".avif" if data[8:12] == b"avif" else ".mp4"
    return next((suffix for magic, suffix in MAGIC if data.startswith(magic)), ".bin")
