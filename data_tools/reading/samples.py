"""Samples of JSONL lines, with media fully decoded before they enter a shard."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.reading.frames import read_frames
from data_tools.reading.lines import Line
from megatron_vita.data.samples.foreign import sample_of
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.records import REJECTED, check_record, is_raw_text
from megatron_vita.data.shards.tar import MEDIA_KINDS, ShardMedia
from megatron_vita.errors import DataError
from megatron_vita.media.data_urls import inline_content, is_inline
from megatron_vita.media.images import open_image
from megatron_vita.media.kinds import FRAMES_SUFFIX, HEAD, suffix_of_content
from megatron_vita.media.video import decode_frames, probe_video


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A checked sample, as `SampleWriter.write` takes it."""

    key: str
    record: dict[str, Any]
    media: dict[str, list[ShardMedia]]


def check_line(line: Line, *, media_root: Path, decode: bool = True) -> Sample:
    """Parse the sample of a line, with its media read and decoded.

    `decode` false only reads media, which are known to be good.

    Raises:
        DataError: without file and line, which the caller adds.
    """
    sample = read_sample(line)
    media = {
        kind: list(_read_media(sample.get(f"{kind}s") or [], kind, media_root))
        for kind in MEDIA_KINDS
    }
    if decode:
        for kind, files in media.items():
            for i, file in enumerate(files):
                _CHECKS[kind](file.data, f"{kind}s[{i}] {sample[f'{kind}s'][i]:.200}")
    body = "messages"
    if is_raw_text(sample):
        body = "text"
    names = (body, REJECTED, "id", "weight")
    record = {name: sample[name] for name in names if name in sample}
    return Sample(key=sample_key(line), record=record, media=media)


def find_medium(name: Any, field: str, *, root: Path) -> Path:
    """Path of a medium that a sample names, inside `root` even if links are followed.

    Raises:
        DataError: naming `field` and path: it is absolute, has `..`, leads outside by a link, or
            does not exist.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{field} is {name!r:.80}: a path under the media folder is needed")
    if "://" in name:
        raise DataError(f"{field} {name} is a URL: a file under the media folder {root} is needed")
    if name.startswith("/"):
        where = ""
        if not Path(os.path.normpath(name)).is_relative_to(root.absolute()):
            where = f" and lies outside the media folder {root}"
        raise DataError(f"{field} {name} is absolute{where}: a path from {root} on is needed")
    if os.path.normpath(name).startswith(".."):
        raise DataError(
            f"{field} {name} lies outside the media folder {root}: a path under it is needed"
        )
    # Through a link, `a/..` is not where it seems to be.
    if ".." in name.split("/"):
        raise DataError(
            f"{field} {name} has .. in it: it is unclear whether it lies outside the media folder"
        )
    path = root / name
    try:
        # Only a link needs to be resolved itself; for other files their folder is enough, which is
        # cached: each look at a disk takes time.
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        if is_link:
            real = path.resolve(strict=True)
        else:
            real = _resolved(path.parent)
    except FileNotFoundError as error:
        raise DataError(f"{field} {name}: cannot read {path}: no such file") from error
    # Names that are too long or have zero bytes, and links in circles.
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{field} {name!r:.200}: not a path: {getattr(error, 'strerror', error)}"
        ) from error
    if not real.is_relative_to(_resolved(root)):
        what = "lies in a folder that is a link"
        if is_link:
            what = "is a link"
        raise DataError(f"{field} {name} {what} to outside the media folder {root}")
    return path


def check_medium(name: Any, field: str, *, root: Path) -> None:
    """Check that a medium exists, or that its data URL or base64 can be decoded.

    Raises:
        DataError: naming `field`.
    """
    if isinstance(name, str) and is_inline(name):
        inline_content(name)
    else:
        find_medium(name, field, root=root)


@lru_cache(maxsize=1 << 14)
def _resolved(folder: Path) -> Path:
    """Resolve the links of a folder; cached, since most media share their folders."""
    return folder.resolve()


def read_sample(line: Line) -> dict[str, Any]:
    """Parse and check the sample of a line, without reading its media.

    Raises:
        DataError: without file and line, which the caller adds.
    """
    record = parse_json(line.text)
    if not isinstance(record, dict):
        found = type(record).__name__
        raise DataError(
            f"it is of type {found}, not a JSON object: a line holds one sample {{...}}"
        )
    sample = sample_of(record, prompt=None)
    check_record(sample)
    return sample


def sample_key(line: Line) -> str:
    """Key of a sample in its shard: the sanitized name of the file, and the line number."""
    return f"{key_stem(line.file)}-{line.number:08d}"


def key_stem(file: Path) -> str:
    """Common beginning of the keys of a file's samples."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)


def _read_media(names: list[Any], kind: str, root: Path) -> Iterator[ShardMedia]:
    for i, name in enumerate(names):
        field = f"{kind}s[{i}]"
        if isinstance(name, str) and is_inline(name):
            data = inline_content(name)
            yield ShardMedia(suffix_of_content(data[:HEAD]), data)
            continue
        path = find_medium(name, field, root=root)
        if kind == "video" and path.is_dir():
            yield ShardMedia(FRAMES_SUFFIX, read_frames(path))
            continue
        # Reading a pipe or a device would never end.
        if not path.is_file():
            raise DataError(f"{field} {name}: {path} is not a file")
        try:
            yield ShardMedia(_suffix(path), path.read_bytes())
        except OSError as error:
            raise DataError(f"{field} {name}: cannot read {path}: {error.strerror}") from error


def _suffix(path: Path) -> str:
    """Suffix of a medium, without characters that are invalid in a shard."""
    if path.name.lower().endswith(FRAMES_SUFFIX):
        return FRAMES_SUFFIX
    return re.sub(r"[^a-z0-9.]", "", path.suffix.lower())


def _check_image(data: bytes, name: str) -> None:
    open_image(data, name)


def _check_video(data: bytes, name: str) -> None:
    # One frame shows that the video can be decoded; `validate` decodes all that are sampled.
    info = probe_video(data, name)
    decode_frames(data, name, times=[info.duration / 2], tile_size=16)


_CHECKS: dict[str, Callable[[bytes, str], None]] = {"image": _check_image, "video": _check_video}
