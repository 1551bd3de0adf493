"""Lines of JSONL files as samples, each checked to the last pixel before it enters a shard."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vita.data.records import check_record, is_raw_text
from megatron_vita.data.shards import MEDIA_KINDS, MediaFile
from megatron_vita.errors import DataError
from megatron_vita.media.images import open_image
from megatron_vita.media.video import decode_frames, probe_video


class Line(NamedTuple):
    """A line of a JSONL file; `number` counts from 1. Empty lines count, but are no samples."""

    file: Path
    number: int
    text: bytes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A checked sample: what `SampleWriter.write` takes."""

    key: str
    record: dict[str, Any]
    media: dict[str, list[MediaFile]]


def read_lines(files: list[Path]) -> Iterator[Line]:
    """The lines of JSONL files that are not empty. DataError if a file cannot be read."""
    for path in files:
        try:
            with open(path, "rb") as file:
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        yield Line(path, number, text)
        except OSError as error:
            raise DataError(f"{path}: cannot read it: {error.strerror}") from error


def check_line(line: Line, *, media_root: Path) -> Sample:
    """The sample of a line, its media read and decoded. DataError, to whose message the caller adds file and line."""
    sample = parse_line(line)
    check_record(sample)
    media = {kind: _read_media(sample.get(f"{kind}s") or [], kind, media_root) for kind in MEDIA_KINDS}
    body = {"text": sample["text"]} if is_raw_text(sample) else {}
    record = body or {"messages": sample.get("messages", sample.get("conversations"))}
    record |= {name: sample[name] for name in ("id", "weight") if name in sample}
    return Sample(key=sample_key(line), record=record, media=media)


def parse_line(line: Line) -> dict[str, Any]:
    """The JSON object of a line. DataError if it is none."""
    try:
        sample = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(sample, dict):
        raise DataError(f"a {type(sample).__name__}, not a JSON object: a line holds one sample {{...}}")
    return sample


def sample_key(line: Line) -> str:
    """The name of a sample in its shard: the file's, without characters that mean something in one, and the line."""
    return f"{key_stem(line.file)}-{line.number:08d}"


def key_stem(file: Path) -> str:
    """What the keys of a file's samples begin with."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", file.stem)


def _read_media(paths: list[Any], kind: str, root: Path) -> list[MediaFile]:
    check = _CHECKS[kind]
    files = []
    for i, name in enumerate(paths):
        field = f"{kind}s[{i}]"
        if not isinstance(name, str):
            raise DataError(f"{field} is {name!r:.80}: a path under the media folder is needed")
        path = Path(os.path.normpath(root / name))
        if not path.is_relative_to(os.path.normpath(root)):
            raise DataError(f"{field} {name} lies outside the media folder {root}")
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{field} {name}: cannot read {path}: {getattr(error, 'strerror', error)}") from error
        check(data, f"{field} {name}")
        files.append(MediaFile(path.suffix.lower(), data))
    return files


def _check_image(data: bytes, name: str) -> None:
    open_image(data, name)


def _check_video(data: bytes, name: str) -> None:
    info = probe_video(data, name)
    decode_frames(data, name, times=[info.duration / 2], tile_size=16)


_CHECKS: dict[str, Callable[[bytes, str], None]] = {"image": _check_image, "video": _check_video}
