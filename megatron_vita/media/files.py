"""Media files in memory, or read as they are needed."""

import io
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
    return len(file) if isinstance(file, bytes) else file.seek(0, io.SEEK_END)
