"""Folders of images and videos with captions in text files: `a/cat.jpg` and `a/cat.txt`.

The text may also be called `a/cat.jpg.txt`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting, refuse, relative_to_media, walk
from data_tools.reading.frames import kind_of_head
from megatron_vita.data.samples.foreign import caption_record
from megatron_vita.data.samples.media_fields import Field, Media
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.kinds import kind_of_name

FIELDS: dict[str, Field] = {"image": "images", "video": "videos"}
CAPTION = ".txt"


def list_sources(paths: list[Path]) -> list[Path]:
    """Return the named folders."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder")
    return paths


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """Yield the media in a folder and its subfolders."""
    for _, group in groupby(walk(source), key=attrgetter("parent")):
        paths = list(group)
        # A caption without a medium beside it points to a medium that is not known by its name.
        known = {path.stem for path in paths if kind_of_name(path.name)}
        captions = {path.stem for path in paths if path.suffix.lower() == CAPTION}
        for path in paths:
            if (field := FIELDS.get(kind_of_name(path.name) or "")) is not None:
                yield Candidate(
                    str(path), partial(captioned, path, field=field, setting=setting), 0
                )
            elif path.suffix.lower() != CAPTION:
                lacks_medium = path.stem in captions - known
                if (make := _refused(path, lacks_medium=lacks_medium)) is not None:
                    yield Candidate(str(path), make, 0)


def captioned(path: Path, *, field: Field, setting: Setting) -> dict[str, Any]:
    """Build the sample of a medium with the caption beside it; raises DataError without one."""
    caption = path.with_suffix(CAPTION)
    named_whole = path.with_name(path.name + CAPTION)
    # A dot in the name of a folder begins no suffix.
    if path.is_dir() or (named_whole.exists() and not caption.exists()):
        caption = named_whole
    try:
        text = caption.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"no caption: cannot read {caption}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{caption}: not UTF-8: {error}") from error
    media: Media = {field: [relative_to_media(path, setting)]}
    return caption_record(text, media, prompt=setting.question, name=str(caption))


def _refused(path: Path, *, lacks_medium: bool) -> Callable[[], dict[str, Any]] | None:
    """Refuse a file that may be a medium, but not by its suffix; None if it is no medium."""
    kind = kind_of_name(path.name) or kind_of_head(path)
    if kind == "audio":
        return refuse(f"{path.name} holds sound, which is not read")
    if kind:
        return refuse(f"{path.name} is an {kind} by its first bytes, but not by its suffix")
    if lacks_medium:
        return refuse(
            f"{path.name} has a caption, but is not an image or a video by suffix or first bytes"
        )
    return None
