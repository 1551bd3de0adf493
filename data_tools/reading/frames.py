"""Packing of frame folders into one file, an uncompressed zip `NAME.frames.zip`."""

import re
from pathlib import Path

from megatron_vita.errors import DataError
from megatron_vita.media.files import is_hidden
from megatron_vita.media.frame_archive import pack_frames
from megatron_vita.media.kinds import (
    HEAD,
    IMAGE_SUFFIXES,
    MediaKind,
    kind_of_content,
    kind_of_name,
)

RATE_FILE = "fps.txt"


def list_frames(folder: Path) -> list[Path]:
    """List the visible frame images of a folder in natural order: numbers by value, 10 after 9."""
    return sorted((path for path in folder.iterdir() if is_image(path.name)), key=_natural)


def is_image(name: str) -> bool:
    """Return true if a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def read_frames(folder: Path) -> bytes:
    """Pack the frames of a folder into one file, at the rate of its `fps.txt` or 1 per second.

    Raises:
        DataError: there is no frame, a frame is a link, another file looks like a medium, or
            `fps.txt` holds no positive number.
    """
    paths = list_frames(folder)
    if not paths:
        raise DataError(f"{folder}: no frame images ({', '.join(IMAGE_SUFFIXES)}) in this folder")
    # A link may lead out of the media folder.
    if links := [path.name for path in paths if path.is_symlink() or not path.is_file()]:
        raise DataError(
            f"{folder}: the frame {links[0]} is a link or no file: plain files are needed"
        )
    if other := next((path for path in folder.iterdir() if _is_unread(path)), None):
        raise DataError(
            f"{folder}: {other.name} looks like a medium, but is not a frame, whose suffixes are "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return pack_frames([(path.name, path.read_bytes()) for path in paths], _rate(folder))


def _is_unread(path: Path) -> bool:
    """Return true if a file among frames looks like a medium, but not like a frame."""
    if is_hidden(path.name) or path.suffix.lower() in IMAGE_SUFFIXES or not path.is_file():
        return False
    return kind_of_name(path.name) is not None or kind_of_head(path) is not None


def kind_of_head(path: Path) -> MediaKind | None:
    """Kind of a file by its first bytes; raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return kind_of_content(file.read(HEAD))
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error


def _rate(folder: Path) -> float:
    path = folder / RATE_FILE
    if not path.exists():
        return 1.0
    text = path.read_text(errors="replace")
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    # NaN fails this comparison, too.
    if not 0 < rate < 1e4:
        raise DataError(
            f"{path}: {text!r:.80} is not a frame rate: a number of frames per second is needed"
        )
    return rate


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sort key that compares the texts and numbers of a name alternately."""
    parts = re.split(r"([0-9]+)", path.name)
    return [
        (text, int(number or 0))
        for text, number in zip(parts[::2], [*parts[1::2], ""], strict=True)
    ]
