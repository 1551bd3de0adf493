"""Image files of the usual kinds as 8-bit RGB.

Ordinary JPEGs are decoded by simplejpeg, whose pixels are Pillow's bit for bit in a third of the
time; all others, and those which simplejpeg finds fault with, by Pillow, which so has the last word
on what is too damaged to be used.
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_vita.errors import DataError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF orientation."""
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
        return (height, width) if self.orientation >= 5 else (width, height)


def read_pixels(data: bytes, name: str) -> Pixels:
    """The first picture in `data`, fully decoded.

    Transparent pixels are laid over white. Grey values of more than 8 bits are scaled to 8: 16-bit
    ones by their range, 32-bit and floating point ones from their own minimum and maximum.

    Raises DataError, which names the image by `name`, for anything that cannot be decoded to its
    end and for images of more than MAX_PIXELS (decompression bombs).
    """
    try:
        with _opened(data) as image:
            orientation = _orientation(image)
            if (plain := _plain_jpeg(image, data)) is not None:
                return Pixels(plain, orientation)
            image.load()
            return Pixels(np.array(_to_rgb(image)), orientation)
    # Pillow's decoders raise OSError, SyntaxError, struct.error and many more
    except Exception as error:
        raise _unreadable(name, data, error) from error


def open_image(data: bytes, name: str) -> Image.Image:
    """What `read_pixels` reads, turned upright."""
    pixels = read_pixels(data, name)
    image = Image.fromarray(pixels.stored)
    return (
        image.transpose(_UPRIGHT[pixels.orientation]) if pixels.orientation in _UPRIGHT else image
    )


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` returns, from the header alone.

    Raises DataError, which names the image by `name`, if the header cannot be read or tells of too
    many pixels.
    """
    try:
        with _opened(data) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except Exception as error:  # as above
        raise _unreadable(name, data, error) from error


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


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
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


def _unreadable(name: str, data: bytes, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}"
    # its own message tells where the file lay in memory
    if isinstance(error, UnidentifiedImageError):
        reason = f"it is of none of the kinds {', '.join(FORMATS)}"
    return DataError(f"{name}: cannot read this image of {len(data)} bytes: {reason}")


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 (upright) where it is missing or damaged. A PNG's is looked for in front of its
    pixels only."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns these while loading
    try:
        # The method of the base class: that of PNG decodes all pixels in search of a late chunk.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF does not make the pixels worthless
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretched(np.asarray(image, dtype=np.float64)))
    elif image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, colors)
    return image.convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values)
    low, high = values.min(), values.max()
    return ((values - low) * (255 / (high - low) if high > low else 0)).round().astype(np.uint8)
