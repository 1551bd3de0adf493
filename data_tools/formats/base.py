"""What formats have in common."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.compressed import refuse_compressed
from megatron_vita.data.samples.foreign import DEFAULT_PROMPT, sample_of
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.files import is_hidden
from megatron_vita.media.kinds import HEAD, suffix_of_content


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an import is told: where media lie, where those found inside sources are written, the
    captions' question (None: the usual one, or the source's own), and fields to be passed over."""

    media: Path
    media_out: Path | None
    prompt: str | None
    ignore: tuple[str, ...] = ()

    def sample_of(self, record: Mapping[str, Any], *, literal_tags: bool = False) -> dict[str, Any]:
        """The sample of a record. DataError naming the field that is not understood."""
        return sample_of(
            record,
            prompt=self.question,
            ignore=self.ignore,
            literal_tags=literal_tags,
        )

    @property
    def question(self) -> str:
        """What the user asks where there is only a caption."""
        if self.prompt is None:
            return DEFAULT_PROMPT
        return self.prompt


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
    if there are none, or if one is compressed."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            refuse_compressed(path, suffixes)
            found.append(path)
            continue
        everything = list(walk(path))
        for file in everything:
            refuse_compressed(file, suffixes)
        inside = [file for file in everything if file.name.lower().endswith(suffixes)]
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
    path = Path(
        f"{source.name.replace('.', '_')}-{where}",
        f"{name}{suffix_of_content(data[:HEAD]) or '.bin'}",
    )
    target = setting.media_out / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, target)
    return path.as_posix()
