"""Lines of JSONL files as samples, each checked to the last pixel before it enters a shard."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.frames import read_frames
from data_tools.lines import Line
from megatron_vita.data.samples.foreign import sample_of
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.records import check_record, is_raw_text
from megatron_vita.data.shards.tar import MEDIA_KINDS, MediaFile
from megatron_vita.errors import DataError
from megatron_vita.media.data_urls import inline_content, is_inline
from megatron_vita.media.images import open_image
from megatron_vita.media.kinds import FRAMES_SUFFIX, HEAD, suffix_of_content
from megatron_vita.media.video import decode_frames, probe_video


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A checked sample: what `SampleWriter.write` takes."""

    key: str
    record: dict[str, Any]
    media: dict[str, list[MediaFile]]


def check_line(line: Line, *, media_root: Path, decode: bool = True) -> Sample:
    """The sample of a line, its media read and decoded. DataError, to whose message the caller adds
    file and line.

    `decode` false reads media only: they are known to be good.
    """
    sample = read_sample(line)
    media = {
        kind: list(_read_media(sample.get(f"{kind}s") or [], kind, media_root))
        for kind in MEDIA_KINDS
    }
    for kind, files in media.items() if decode else ():
        for i, file in enumerate(files):
            _CHECKS[kind](file.data, f"{kind}s[{i}] {sample[f'{kind}s'][i]:.200}")
    body = "text" if is_raw_text(sample) else "messages"
    record = {name: sample[name] for name in (body, "id", "weight") if name in sample}
    return Sample(key=sample_key(line), record=record, media=media)


def find_medium(name: Any, field: str, *, root: Path) -> Path:
    """The path of a medium that a sample names, which must lie in `root`, also when links are
    followed.

    DataError, naming `field` and the path, for absolute paths, `..`, links that lead outside, and
    what is not there.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{field} is {name!r:.80}: a path under the media folder is needed")
    if "://" in name:
        raise DataError(f"{field} {name} is a URL: a file under the media folder {root} is needed")
    if name.startswith("/"):
        inside = Path(os.path.normpath(name)).is_relative_to(root.absolute())
        where = "" if inside else f" and lies outside the media folder {root}"
        raise DataError(f"{field} {name} is absolute{where}: a path from {root} on is needed")
    if os.path.normpath(name).startswith(".."):
        raise DataError(
            f"{field} {name} lies outside the media folder {root}: a path under it is needed"
        )
    if ".." in name.split("/"):
        raise DataError(
            f"{field} {name} has .. in it: nothing tells whether it lies outside the media folder"
        )
    path = root / name
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        real = path.resolve(strict=True) if is_link else _resolved(path.parent)
    except FileNotFoundError as error:
        raise DataError(f"{field} {name}: cannot read {path}: no such file") from error
    # names too long, with zero bytes, links in circles
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{field} {name!r:.200}: not a path: {getattr(error, 'strerror', error)}"
        ) from error
    if not real.is_relative_to(_resolved(root)):
        what = "is a link" if is_link else "lies in a folder that is a link"
        raise DataError(f"{field} {name} {what} to outside the media folder {root}")
    return path


def check_medium(name: Any, field: str, *, root: Path) -> None:
    """Raise a DataError, which names `field`, unless a sample names a medium that is there, or holds
    one as a data URL or in base64."""
    if isinstance(name, str) and is_inline(name):
        inline_content(name)
    else:
        find_medium(name, field, root=root)


@lru_cache(maxsize=1 << 14)
def _resolved(folder: Path) -> Path:
    """A folder with its links followed: most media share theirs, and each look at a disk takes
    time."""
    return folder.resolve()


def read_sample(line: Line) -> dict[str, Any]:
    """The sample of a line: checked messages or text, and the media that it names. DataError, to
    whose message the caller adds file and line."""
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
    """The name of a sample in its shard: the file's, without characters that mean something in one,
    and the line."""
    return f"{key_stem(line.file)}-{line.number:08d}"


def key_stem(file: Path) -> str:
    """What the keys of a file's samples begin with."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)


def _read_media(names: list[Any], kind: str, root: Path) -> Iterator[MediaFile]:
    for i, name in enumerate(names):
        field = f"{kind}s[{i}]"
        if isinstance(name, str) and is_inline(name):
            data = inline_content(name)
            yield MediaFile(suffix_of_content(data[:HEAD]), data)
            continue
        path = find_medium(name, field, root=root)
        if kind == "video" and path.is_dir():
            yield MediaFile(FRAMES_SUFFIX, read_frames(path))
            continue
        if not path.is_file():  # a pipe or a device would never end
            raise DataError(f"{field} {name}: {path} is not a file")
        try:
            yield MediaFile(_suffix(path), path.read_bytes())
        except OSError as error:
            raise DataError(f"{field} {name}: cannot read {path}: {error.strerror}") from error


def _suffix(path: Path) -> str:
    """The suffix of a medium, without what a name in a shard must not hold."""
    if path.name.lower().endswith(FRAMES_SUFFIX):
        return FRAMES_SUFFIX
    return re.sub(r"[^a-z0-9.]", "", path.suffix.lower())


def _check_image(data: bytes, name: str) -> None:
    open_image(data, name)


def _check_video(data: bytes, name: str) -> None:
    info = probe_video(data, name)
    decode_frames(data, name, times=[info.duration / 2], tile_size=16)


_CHECKS: dict[str, Callable[[bytes, str], None]] = {"image": _check_image, "video": _check_video}
