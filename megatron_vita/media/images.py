"""Image files of any kind that Pillow reads, as upright 8-bit RGB."""

import io

import numpy as np
from PIL import ExifTags, Image

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


def open_image(data: bytes, name: str) -> Image.Image:
    """The first picture in `data`, fully decoded, turned by its EXIF orientation, in RGB.

    Transparent pixels are laid over white. Grey values of more than 8 bits are scaled to 8: 16-bit ones by their range,
    32-bit and floating point ones from their own minimum and maximum.

    Raises DataError, which names the image by `name`, for anything that cannot be decoded to its end and for images of
    more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS` (decompression bombs).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            image.load()
            upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
            return _to_rgb(upright)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and many more
        raise _unreadable(name, data, error) from error


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels of what `open_image` returns, from the header alone.

    Raises DataError, which names the image by `name`, if the header cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except Exception as error:  # as above
        raise _unreadable(name, data, error) from error


def _unreadable(name: str, data: bytes, error: Exception) -> DataError:
    return DataError(f"{name}: cannot read this image of {len(data)} bytes: {type(error).__name__}: {error}")


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 (upright) where it is missing or damaged. A PNG's is looked for in front of its pixels only."""
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
