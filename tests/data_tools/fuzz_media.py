"""Hostile media for the fuzzer: images and videos of every odd kind, and damage to any bytes."""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import av
import numpy as np
from PIL import Image

from megatron_vita.media.frame_archive import pack_frames

File = tuple[str, bytes]


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    picture = Image.effect_noise((width, height), 90)
    if mode == "L":
        return picture
    return picture.convert("RGB").convert(mode)


def png_of(
    width: int, height: int, *, depth: int = 1, color: int = 0, rows: int | None = None
) -> bytes:
    """A PNG of black pixels whose header tells any size; `rows` of them are really there."""
    line = bytes(1 + (width * depth * {0: 1, 2: 3, 6: 4}[color] + 7) // 8)
    pixels = zlib.compressobj(1)
    data = (
        b"".join(pixels.compress(line) for _ in range(height if rows is None else rows))
        + pixels.flush()
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@cache
def images() -> dict[str, File]:
    """Odd images by name; some can be used, some cannot."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise(40, 30).convert("P") for _ in range(3)]
    gray16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    floats = Image.fromarray(np.full((30, 40), 0.5, dtype=np.float32))
    no_numbers = Image.fromarray(np.full((30, 40), np.nan, dtype=np.float32))
    return {
        "plain": (".png", saved(noise(40, 30), "PNG")),
        "baseline": (".jpg", saved(noise(90, 60), "JPEG")),
        "progressive": (".jpg", saved(noise(90, 60), "JPEG", progressive=True)),
        "cmyk": (".jpg", saved(noise(40, 30, "CMYK"), "JPEG")),
        "gray": (".jpg", saved(noise(40, 30, "L"), "JPEG")),
        "16 bits": (".png", saved(gray16, "PNG")),
        "floats": (".tif", saved(floats, "TIFF")),
        "floats that are no numbers": (".tif", saved(no_numbers, "TIFF")),
        "palette": (".png", saved(noise(40, 30).convert("P"), "PNG", transparency=0)),
        "gray and alpha": (".png", saved(noise(40, 30, "L").convert("LA"), "PNG")),
        "alpha": (".webp", saved(noise(40, 30).convert("RGBA"), "WEBP")),
        "one bit": (".png", saved(noise(40, 30, "L").convert("1"), "PNG")),
        "rotated": (".jpg", saved(noise(40, 30), "JPEG", exif=exif)),
        "broken EXIF": (
            ".jpg",
            saved(noise(40, 30), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        ),
        "animated": (".gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "animated webp": (
            ".webp",
            saved(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:]),
        ),
        "30,000 wide": (".png", png_of(30000, 2)),
        "30,000 high": (".png", png_of(2, 30000, depth=8, color=2)),
        "30,000 square, not there": (".png", png_of(30000, 30000, rows=4)),
        "bomb": (".png", png_of(18000, 18000)),
        "largest size": (".png", png_of(2**31 - 1, 2**31 - 1, rows=1)),
        "no size": (".png", png_of(0, 0, rows=1)),
        "one pixel": (".bmp", saved(noise(1, 1), "BMP")),
        "icon": (".ico", saved(noise(16, 16), "ICO")),
        "jpeg 2000": (".jp2", saved(noise(40, 30), "JPEG2000")),
        "portable": (".ppm", saved(noise(40, 30), "PPM")),
        "portable of any size": (".ppm", b"P6 99999999 99999999 255\n"),
        "tga": (".tga", saved(noise(40, 30), "TGA")),
        "program": (
            ".eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        ),
        "empty": (".jpg", b""),
        "text": (".jpg", b"This is no picture."),
        "html": (".png", b"<html><body>404 Not Found</body></html>"),
        "svg": (".svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "zeros": (".jpg", bytes(5000)),
    }


def film(
    file_format: str = "mp4",
    codec: str = "mpeg4",
    *,
    frames: int = 12,
    gop: int = 4,
    stamp: Callable = lambda i: i,
) -> bytes:
    """A small video at 4 frames a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=file_format) as container:
        stream: Any = container.add_stream(codec, rate=4)
        stream.width = 48
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 4)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 48, 3), 20 * i % 256, np.uint8), format="rgb24"
            )
            frame.pts = stamp(i)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def zipped(
    *members: tuple[str, bytes], comment: bytes = b"", compression: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.comment = comment
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


@cache
def videos() -> dict[str, File]:
    """Odd videos by name."""
    picture = saved(noise(40, 30), "JPEG")
    avi = film("avi")
    return {
        "mp4": (".mp4", film()),
        "h264": (".mp4", film(codec="libx264")),
        "matroska": (".mkv", film("matroska")),
        "webm": (".webm", film("webm", "libvpx-vp9")),
        "no keyframe index": (".ts", film("mpegts")),
        "avi without its index": (".avi", avi[: avi.index(b"idx1")]),
        "one key frame": (".mp4", film(frames=60, gop=600)),
        "raw": (".h264", film("h264", "libx264")),
        "one frame": (".mp4", film(frames=1)),
        "12 hours": (".mp4", film(frames=12, stamp=lambda i: i * 4 * 3600)),
        "uneven": (".mp4", film(stamp=lambda i: i * i)),
        "starts late": (".mkv", film("matroska", stamp=lambda i: 4000 + i)),
        "sound alone": (".mp4", sound()),
        "no index": (".mp4", film()[:400]),
        "empty": (".mp4", b""),
        "text": (".mp4", b"no film at all"),
        "a picture": (".mp4", picture),
        "animated picture": (".gif", images()["animated"][1]),
        "playlist": (".m3u8", b"#EXTM3U\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n"),
        "list of files": (".mp4", b"ffconcat version 1.0\nfile /etc/hostname\n"),
        "frames": (".frames.zip", pack_frames([(f"{i}.jpg", picture) for i in range(5)], 2.0)),
        "no frames": (".frames.zip", zipped(comment=b"2")),
        "frames with paths": (
            ".frames.zip",
            zipped(("../../a.jpg", picture), ("/b.jpg", picture), comment=b"1"),
        ),
        "frames that are none": (
            ".frames.zip",
            zipped(("a.jpg", b"x"), ("b.jpg", b""), comment=b"1"),
        ),
        "frames at no rate": (".frames.zip", zipped(("a.jpg", picture), comment=b"-3")),
        "frames, zip bomb": (
            ".frames.zip",
            zipped(("a.bmp", bytes(1 << 26)), compression=zipfile.ZIP_DEFLATED),
        ),
        "frames, one of them a bomb": (
            ".frames.zip",
            zipped(("a.png", images()["bomb"][1]), ("b.jpg", picture)),
        ),
    }


def damaged(data: bytes, dice: random.Random) -> bytes:
    """The bytes cut short, with some flipped, overwritten, doubled or left out."""
    harmed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        place = dice.randrange(len(harmed) + 1)
        length = dice.choice((1, 4, 64, 1024))
        deed = dice.randrange(5)
        if deed == 0:
            del harmed[place:]
        elif deed == 1 and place < len(harmed):
            harmed[place] ^= 1 << dice.randrange(8)
        elif deed == 2:
            harmed[place : place + length] = dice.randbytes(len(harmed[place : place + length]))
        elif deed == 3:
            harmed[place:place] = harmed[place : place + length]
        else:
            del harmed[place : place + length]
    return bytes(harmed)
