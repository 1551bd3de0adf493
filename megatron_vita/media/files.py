"""Media files in memory, or read as they are needed."""

import io
from pathlib import PurePosixPath
from typing import IO

File = bytes | IO[bytes]
"""A whole file, or one that is open for reading and can seek."""


def opened(file: File) -> IO[bytes]:
    """The file, to be read from its beginning."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    file.seek(0)
    return file


def num_bytes(file: File) -> int:
    """Its length."""
    if isinstance(file, bytes):
        return len(file)
    return file.seek(0, io.SEEK_END)


_HIDDEN = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
"""What macOS, Synology and Windows leave beside files, without regard to case."""


def is_hidden(path: str) -> bool:
    """Whether a path in a folder or archive is of no medium: hidden, or a desktop's bookkeeping.

    A copy from a Mac has an AppleDouble file `._0001.jpg` beside each `0001.jpg`, or a folder
    `__MACOSX` of them.
    """
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return any(part.startswith(".") or part.lower() in _HIDDEN for part in parts if part != "..")
