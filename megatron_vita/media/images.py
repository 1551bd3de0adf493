"""Decoding of image files to 8-bit RGB.

Ordinary JPEGs are decoded by simplejpeg, whose pixels equal Pillow's bit for bit in a third of the
time. All others, and those that simplejpeg rejects, are decoded by Pillow, which thus decides
whether a file is too damaged to be used.
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
"""Supported formats, by Pillow's names. EPS is a program to be run, TGA has no signature."""
MAX_PIXELS = 2**29 // 3
"""Largest image in pixels: 512 MiB as RGB. Larger ones are refused before they are decoded."""


class Pixels(NamedTuple):
    """Decoded image: uint8 `[height, width, 3]` in RGB as stored, and its EXIF orientation (1 to
    8)."""

    stored: np.ndarray
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        height, width = self.stored.shape[:2]
        if self.orientation >= 5:
            return (height, width)
        return (width, height)


def read_pixels(data: bytes, name: str) -> Pixels:
    """Decode the first picture in `data` completely.

    Transparent pixels are composited over white. Values of more or fewer than 8 bits are scaled to
    8 by the depth that the file states; floating point values range from 0 (black) to 1 (white).

    Raises:
        DataError: naming the image by `name`: it cannot be decoded to its end, has more than
            MAX_PIXELS (a decompression bomb), or has samples without defined black and white:
            signed integers, floating point values outside 0 to 1.
    """
    try:
        with _opened(data) as image:
            orientation = exif_orientation(image, data)
            if (plain := _plain_jpeg(image, data)) is not None:
                return Pixels(plain, orientation)
            check_samples(image)
            image.load()
            return Pixels(np.array(_to_rgb(to_8_bits(image, data))), orientation)
    # Pillow's decoders raise OSError, SyntaxError, struct.error and many more.
    except Exception as error:
        raise _unreadable(name, data, error) from error


def open_image(data: bytes, name: str) -> Image.Image:
    """Decode an image and turn it upright; raises as `read_pixels`."""
    return upright(read_pixels(data, name))


def upright(pixels: Pixels) -> Image.Image:
    """Turn a decoded image upright."""
    image = Image.fromarray(pixels.stored)
    if pixels.orientation in UPRIGHT:
        return image.transpose(UPRIGHT[pixels.orientation])
    return image


def image_size(data: bytes, name: str, *, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """Width and height in pixels of the upright image, from the header alone.

    Raises:
        DataError: naming the image by `name`: its header cannot be read, is of none of the
            `formats`, or states too many pixels.
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
    """Turn planes `[..., height, width]` of a stored image upright; returns a view."""
    # EXIF: 5 to 8 are transposed; after that 3, 4, 7, 8 are upside down and 2, 3, 6, 7 mirrored.
    if orientation >= 5:
        tiles = tiles.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        tiles = tiles[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        tiles = tiles[..., ::-1]
    return tiles


def _opened(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=list(formats))
    # Pillow reads only the header here: refuse decompression bombs before any pixel is decoded.
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    return image


def _plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Decode a JPEG in colour or grey to uint8 `[height, width, 3]`; None for others and on any
    error."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        # The slow DCT and upsampling are those of Pillow, for equal pixels; `strict` makes warnings
        # errors, which leave the decision about damaged files to Pillow.
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def _unreadable(
    name: str, data: bytes, error: Exception, formats: Sequence[str] = FORMATS
) -> DataError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own message prints the address of the buffer in memory.
        reason = _why_not_identified(data, formats)
    elif isinstance(error, DataError):
        reason = str(error)
    return DataError(f"{name}: cannot read this image of {len(data)} bytes: {reason}")


def _why_not_identified(data: bytes, formats: Sequence[str]) -> str:
    """Explain why Pillow identifies a file as none of `formats`."""
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
