"""Image files of the usual kinds as 8-bit RGB.

Ordinary JPEGs are decoded by simplejpeg, whose pixels are Pillow's bit for bit in a third of the
time; all others, and those which simplejpeg finds fault with, by Pillow, which so has the last word
on what is too damaged to be used.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from megatron_vita.errors import DataError
from megatron_vita.media.depth import check_samples, to_8_bits
from megatron_vita.media.orientation import UPRIGHT, exif_orientation

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, by Pillow's names. Others are drawn by programs (EPS) or known by too little (TGA)."""
MAX_PIXELS = 2**29 // 3
"""Most pixels of an image: 512 MiB as RGB. Files that hold more are refused before they are decoded."""


class Pixels(NamedTuple):
    """An image as it is stored: uint8 `[height, width, 3]` in RGB, and the EXIF orientation (1 to
    8) it is seen in."""

    stored: np.ndarray
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as it is seen."""
        height, width = self.stored.shape[:2]
        if self.orientation >= 5:
            return (height, width)
        return (width, height)


def read_pixels(data: bytes, name: str) -> Pixels:
    """The first picture in `data`, fully decoded.

    Transparent pixels are laid over white. Values of more or fewer than 8 bits are scaled to 8 by
    the depth that the file states; floating point ones go from 0 (black) to 1 (white).

    Raises DataError, which names the image by `name`, for anything that cannot be decoded to its
    end, for images of more than MAX_PIXELS (decompression bombs), and for samples whose black and
    white are not told: signed integers, floating point values beyond 0 to 1.
    """
    try:
        with _opened(data) as image:
            orientation = exif_orientation(image, data)
            if (plain := _plain_jpeg(image, data)) is not None:
                return Pixels(plain, orientation)
            check_samples(image)
            image.load()
            return Pixels(np.array(_to_rgb(to_8_bits(image, data))), orientation)
    # Pillow's decoders raise OSError, SyntaxError, struct.error and many more
    except Exception as error:
        raise _unreadable(name, data, error) from error


def open_image(data: bytes, name: str) -> Image.Image:
    """What `read_pixels` reads, turned upright."""
    return upright(read_pixels(data, name))


def upright(pixels: Pixels) -> Image.Image:
    """The image as it is seen."""
    image = Image.fromarray(pixels.stored)
    if pixels.orientation in UPRIGHT:
        return image.transpose(UPRIGHT[pixels.orientation])
    return image


def image_size(data: bytes, name: str, *, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` returns, from the header alone.

    Raises DataError, which names the image by `name`, if the header cannot be read, is of none of
    the `formats`, or tells of too many pixels.
    """
    try:
        with _opened(data, formats) as image:
            width, height = image.size
            if exif_orientation(image, data) >= 5:
                return (height, width)
            return (width, height)
    except Exception as error:  # as above
        raise _unreadable(name, data, error, formats) from error


def turned(tiles: np.ndarray, orientation: int) -> np.ndarray:
    """Planes `[..., height, width]` of an image as stored, as they are seen in its EXIF
    orientation; a view."""
    if orientation >= 5:
        tiles = tiles.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        tiles = tiles[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        tiles = tiles[..., ::-1]
    return tiles


def _opened(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=list(formats))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    return image


def _plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """uint8 `[height, width, 3]` of a JPEG in colour or grey; None for others and where anything is
    wrong with it."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def _unreadable(
    name: str, data: bytes, error: Exception, formats: Sequence[str] = FORMATS
) -> DataError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its message tells where the file lay in memory
        reason = _why_not_identified(data, formats)
    elif isinstance(error, DataError):
        reason = str(error)
    return DataError(f"{name}: cannot read this image of {len(data)} bytes: {reason}")


def _why_not_identified(data: bytes, formats: Sequence[str]) -> str:
    """The reason for which Pillow takes a file for none of `formats`."""
    for kind in formats:
        factory, accepts = Image.OPEN[kind]
        if accepts is None or accepts(data[:16]) is not True:
            continue
        try:
            factory(io.BytesIO(data), "")
        except Exception as error:  # as in `read_pixels`
            return f"{kind}: {type(error).__name__}: {error}"
    return f"it is of none of the kinds {', '.join(formats)}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, colors)
    return image.convert("RGB")
