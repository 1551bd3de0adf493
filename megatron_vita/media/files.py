"""Media files in memory, or opened for reading in parts."""

import io
from pathlib import PurePosixPath
from typing import IO

File = bytes | IO[bytes]
"""A whole file, or one that is open for reading and can seek."""


def opened(file: File) -> IO[bytes]:
    """Return a file object at the beginning of the file."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    file.seek(0)
    return file


def num_bytes(file: File) -> int:
    """Size of the file in bytes."""
    if isinstance(file, bytes):
        return len(file)
    return file.seek(0, io.SEEK_END)


_HIDDEN = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
"""Files and folders that macOS, Synology and Windows create; compared in lower case."""


def is_hidden(path: str) -> bool:
    """Return true for hidden files and bookkeeping of desktops in a folder or archive.

    A copy from a Mac has an AppleDouble file `._0001.jpg` beside each `0001.jpg`, or a folder
    `__MACOSX` of them.
    """
    # ZIP files made on Windows may have backslashes in names.
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return any(part.startswith(".") or part.lower() in _HIDDEN for part in parts if part != "..")
