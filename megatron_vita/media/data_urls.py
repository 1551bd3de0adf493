"""Media as data URLs (RFC 2397), as the chat completions protocol carries them."""

import base64
from typing import Literal

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


def data_url(data: bytes, kind: Literal["image", "video"]) -> str:
    """A file's content as a URL; its type is told by its first bytes, as far as they tell."""
    known = (name for signature, name in _SIGNATURES[kind].items() if data.startswith(signature))
    return f"data:{next(known, _OTHERS[kind])};base64,{base64.b64encode(data).decode('ascii')}"
