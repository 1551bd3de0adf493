"""Media inside a text: as data URLs (RFC 2397), as the chat completions protocol carries them, or
as base64 alone."""

import base64
import binascii
import re
from typing import Literal

from megatron_vita.errors import DataError
from megatron_vita.media.kinds import kind_of_content

_SIGNATURES = {
    "image": {
        b"\x89PNG": "image/png",
        b"\xff\xd8\xff": "image/jpeg",
        b"GIF8": "image/gif",
        b"BM": "image/bmp",
        b"RIFF": "image/webp",
    },
    "video": {
        b"PK\x03\x04": "application/zip",  # an archive of frames
        b"\x1aE\xdf\xa3": "video/webm",  # or Matroska, which has the same first bytes
        b"RIFF": "video/x-msvideo",
    },
}
_OTHERS = {"image": "image/png", "video": "video/mp4"}
_URL = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
_BASE64_HEAD = 680  # characters of base64 that tell what it holds


def data_url(data: bytes, kind: Literal["image", "video"]) -> str:
    """A file's content as a URL; its type is told by its first bytes, as far as they tell."""
    known = (name for signature, name in _SIGNATURES[kind].items() if data.startswith(signature))
    return f"data:{next(known, _OTHERS[kind])};base64,{base64.b64encode(data).decode('ascii')}"


def is_inline(text: str) -> bool:
    """Whether a text is a file's content: a data URL, or the base64 of a known medium."""
    if text.startswith(("data:", "DATA:")):
        return _URL.match(text) is not None
    head = text[:_BASE64_HEAD]
    if not _BASE64.fullmatch(head):
        return False
    whole = "".join(head.split()).rstrip("=")
    return kind_of_content(base64.b64decode(whole[: len(whole) // 4 * 4])) is not None


def inline_content(text: str) -> bytes:
    """The content of a file that a text is, for which `is_inline` holds.

    Raises:
        DataError: the base64 is damaged.
    """
    match = _URL.match(text)
    try:
        return base64.b64decode("".join(text[match.end() if match else 0 :].split()), validate=True)
    except binascii.Error as error:
        raise DataError(f"{text[:40]!r}...: not base64: {error}") from error
