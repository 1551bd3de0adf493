"""Pictures and their files for the tests of media."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(size: tuple[int, int], seed: int = 0, *, grain: int = 6) -> Image.Image:
    """Smooth colours of the full range under grain."""
    noise = np.random.default_rng(seed)
    small = Image.fromarray(noise.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(
        np.clip(pixels + noise.integers(-grain, grain + 1, pixels.shape), 0, 255).astype(np.uint8)
    )


def exif_of(orientation: int) -> Image.Exif:
    """EXIF data that tells of an orientation alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def tiff_of(
    planes: list[bytes], size: tuple[int, int], *, order: str = "<", **tags: int | list[int]
) -> bytes:
    """A TIFF of one strip a plane, the planes first; tags are named `t258` (BitsPerSample) etc."""
    starts = 8 + np.cumsum([0, *(len(plane) for plane in planes)])
    known: dict[int, Any] = {256: size[0], 257: size[1], 259: 1, 277: len(planes), 278: size[1]}
    known |= {273: starts[:-1].tolist(), 279: [len(plane) for plane in planes]}
    known |= {int(name[1:]): value for name, value in tags.items()}
    arrays = b""
    entries = b""
    for tag, value in sorted(known.items()):
        values = value if isinstance(value, list) else [value]
        content = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            arrays, content = arrays + content, struct.pack(f"{order}I", starts[-1] + len(arrays))
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + content
    body = b"".join(planes) + arrays
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(known)) + entries + bytes(4)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_of(rows: list[bytes], width: int, *, bits: int, color: int, **chunks: bytes) -> bytes:
    """A PNG of a colour type whose rows are packed already, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0)
    before = b"".join(png_chunk(kind.encode(), content) for kind, content in chunks.items())
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + before
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )
