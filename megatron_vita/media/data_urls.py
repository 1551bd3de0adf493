"""Media embedded in text: data URLs (RFC 2397) as in the chat completions API, or plain base64."""

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
_BASE64_HEAD = 680  # characters of base64 that are decoded to find the kind of medium


def data_url(data: bytes, kind: Literal["image", "video"]) -> str:
    """Encode a file as a data URL, with the media type of its first bytes if they are known."""
    known = (name for signature, name in _SIGNATURES[kind].items() if data.startswith(signature))
    return f"data:{next(known, _OTHERS[kind])};base64,{base64.b64encode(data).decode('ascii')}"


def is_inline(text: str) -> bool:
    """Return true for a data URL, or for base64 that begins like a known medium."""
    if text.startswith(("data:", "DATA:")):
        return _URL.match(text) is not None
    head = text[:_BASE64_HEAD]
    if not _BASE64.fullmatch(head):
        return False
    # Base64 decodes in groups of 4 characters; the head may end inside a group.
    whole = "".join(head.split()).rstrip("=")
    return kind_of_content(base64.b64decode(whole[: len(whole) // 4 * 4])) is not None


def inline_content(text: str) -> bytes:
    """Decode embedded media, for which `is_inline` is true.

    Raises:
        DataError: the base64 is damaged.
    """
    if match := _URL.match(text):
        encoded = text[match.end() :]
    else:
        encoded = text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except binascii.Error as error:
        raise DataError(f"{text[:40]!r}...: not base64: {error}") from error
