"""Folders of images, each with a caption in a text file of the same name: `a/cat.jpg` and
`a/cat.txt`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting, relative_to_media, walk
from data_tools.frames import is_image
from megatron_vita.data.samples.third_party import caption_record
from megatron_vita.errors import ConfigError, DataError


def list_sources(paths: list[Path]) -> list[Path]:
    """The folders as they are named."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder")
    return paths


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The images of a folder and those in it."""
    for path in walk(source):
        if is_image(path.name):
            yield Candidate(str(path), partial(captioned, path, field="images", setting=setting), 0)


def captioned(path: Path, *, field: str, setting: Setting) -> dict[str, Any]:
    """The sample of a medium with the caption beside it. DataError if there is none."""
    caption = path.with_suffix(".txt")
    if path.is_dir():
        caption = path.with_name(path.name + ".txt")
    try:
        text = caption.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"no caption: cannot read {caption}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{caption}: not UTF-8: {error}") from error
    media = {field: [relative_to_media(path, setting)]}
    return caption_record(text, media, prompt=setting.prompt, name=str(caption))
