"""Common parts of the import formats."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.reading.compressed import refuse_compressed
from megatron_vita.data.samples.foreign import DEFAULT_PROMPT, sample_of
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import atomic_write
from megatron_vita.media.files import is_hidden
from megatron_vita.media.kinds import HEAD, suffix_of_content


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of an import.

    Attributes:
        media: folder to which media paths of samples are relative.
        media_out: folder for media found inside sources.
        prompt: user's question for captions; None: the source's own, or the default.
        ignore: fields to ignore.
    """

    media: Path
    media_out: Path | None
    prompt: str | None
    ignore: tuple[str, ...] = ()

    def sample_of(self, record: Mapping[str, Any], *, literal_tags: bool = False) -> dict[str, Any]:
        """Convert a record to a sample; raises DataError naming a field that is not understood."""
        return sample_of(
            record,
            prompt=self.question,
            ignore=self.ignore,
            literal_tags=literal_tags,
        )

    @property
    def question(self) -> str:
        """User's question for samples with only a caption."""
        if self.prompt is None:
            return DEFAULT_PROMPT
        return self.prompt


class Candidate(NamedTuple):
    """A sample that may be good.

    Attributes:
        place: position in the source, for messages.
        make: builds the sample, or raises DataError.
        position: bytes of the source up to its end, for the progress bar.
    """

    place: str
    make: Callable[[], dict[str, Any]]
    position: int


class Format(NamedTuple):
    """An import format.

    Attributes:
        list_sources: lists the sources (files or folders) among the paths that a user names.
        read: reads the samples of a source; raises DataError where it cannot be read on.
        writes_media: the sources hold media, which are written to files.
    """

    list_sources: Callable[[list[Path]], list[Path]]
    read: Callable[[Path, Setting], Iterator[Candidate]]
    writes_media: bool = False


def refuse(reason: str) -> Callable[[], dict[str, Any]]:
    """Return a `Candidate.make` that raises DataError for a bad sample."""

    def make() -> dict[str, Any]:
        raise DataError(reason)

    return make


def find_files(paths: list[Path], *suffixes: str) -> list[Path]:
    """List named files, and the files with one of the suffixes in named folders, sorted.

    Raises:
        ConfigError: a folder has no such file, or a file is compressed.
    """
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
    """Yield the visible files in a folder and its subfolders, by name; links to folders are
    skipped."""
    for root, folders, names in os.walk(folder):
        # In place: os.walk descends into what remains, in this order.
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(root, name) for name in sorted(names) if not is_hidden(name))


def relative_to_media(path: Path, setting: Setting) -> str:
    """Path of a file relative to the media folder; raises DataError if it is outside."""
    try:
        return path.absolute().relative_to(setting.media.absolute()).as_posix()
    except ValueError:
        raise DataError(
            f"{path} lies outside the media folder {setting.media}: name another with --media"
        ) from None


def write_medium(data: bytes, *, source: Path, name: str, setting: Setting) -> str:
    """Write a medium found inside a source, to a folder of the source's own.

    Returns:
        Its path relative to the media folder.
    """
    assert setting.media_out is not None
    # Sources of different folders may have one name: the path's digest keeps their media apart.
    where = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:16]
    path = Path(
        f"{source.name.replace('.', '_')}-{where}",
        f"{name}{suffix_of_content(data[:HEAD]) or '.bin'}",
    )
    target = setting.media_out / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        partial.write_bytes(data)
    return path.as_posix()
