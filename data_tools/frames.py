"""Folders of frame images as one file: an uncompressed zip, `NAME.frames.zip`."""

import re
from pathlib import Path

from megatron_vita.errors import DataError
from megatron_vita.media.files import is_hidden
from megatron_vita.media.frame_archive import pack_frames

FRAMES_SUFFIX = ".frames.zip"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
RATE_FILE = "fps.txt"


def list_frames(folder: Path) -> list[Path]:
    """The frame images of a folder that are not hidden, in the order of their names: numbers by
    value, so that 10 follows 9."""
    return sorted((path for path in folder.iterdir() if is_image(path.name)), key=_natural)


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def read_frames(folder: Path) -> bytes:
    """The frames of a folder packed into one file. Their rate is in its `fps.txt`, one a second
    where that is missing.

    DataError if there are none, a frame is a link, or `fps.txt` holds no positive number.
    """
    paths = list_frames(folder)
    if not paths:
        raise DataError(f"{folder}: no frame images ({', '.join(IMAGE_SUFFIXES)}) in this folder")
    if links := [path.name for path in paths if path.is_symlink() or not path.is_file()]:
        raise DataError(
            f"{folder}: the frame {links[0]} is a link or no file: plain files are needed"
        )
    return pack_frames([(path.name, path.read_bytes()) for path in paths], _rate(folder))


def _rate(folder: Path) -> float:
    path = folder / RATE_FILE
    if not path.exists():
        return 1.0
    text = path.read_text(errors="replace")
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e4:
        raise DataError(
            f"{path}: {text!r:.80} is no frame rate: a number of frames per second is needed"
        )
    return rate


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sorts by the texts and numbers of a name, in turns."""
    parts = re.split(r"([0-9]+)", path.name)
    return [
        (text, int(number or 0))
        for text, number in zip(parts[::2], [*parts[1::2], ""], strict=True)
    ]
