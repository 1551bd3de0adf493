"""Conversion of pixels to 8 bits, by the bit depth stated in the file.

Pillow's mode gives the format of samples in memory, not the value of white: TIFFs of 12 and of 16
bits are both `I;16`. The file states it: a PGM by its maxval (which Pillow scales to 65535), a TIFF
by BitsPerSample and PhotometricInterpretation, a JPEG 2000 by the precision of a component.
"""

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from megatron_vita.errors import DataError

_SIGNED = 2
"""SampleFormat of signed integers."""
_WHITE_IS_ZERO = 0
"""PhotometricInterpretation of grey in which 0 is white."""
_SIZ = b"\xff\x4f\xff\x51"
"""Beginning of a JPEG 2000 codestream: the markers SOC and SIZ."""
_FIRST_PRECISION = 42
"""Byte of SIZ, from its beginning, that holds the first component's bits less one, and its sign."""


def check_samples(image: Image.Image) -> None:
    """Refuse files that Pillow decodes to wrong values.

    Raises:
        DataError: a TIFF of signed integers, which does not state black and white, or one with
            separate uncompressed planes of more than 8 bits, which Pillow reads as bytes.
    """
    if not isinstance(image, TiffImageFile):
        return
    tags = image.tag_v2
    if _SIGNED in tags.get(SAMPLEFORMAT, ()):
        raise DataError("its samples are signed integers: unsigned ones are needed")
    is_raw = bool(image.tile) and image.tile[0].codec_name == "raw"
    if is_raw and tags.get(PLANAR_CONFIGURATION) == 2 and max(tags[BITSPERSAMPLE]) > 8:
        raise DataError(
            "its planes of more than 8 bits are apart and uncompressed: interleaved samples "
            "or compressed planes are needed"
        )


def to_8_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Convert the loaded image of the file `data` to samples of 8 bits.

    Grey of modes I;16, I and F becomes L, or LA if a PNG declares a value transparent.

    Raises:
        DataError: floating point values outside 0 (black) to 1 (white).
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image, data)
    if image.format == "PNG" and "transparency" in image.info:
        # Byte 24 of a PNG, in its header chunk, is the bit depth.
        image.info["transparency"] = _transparent(image, bits=data[24])
    if image.format == "JPEG2000" and image.mode in ("L", "LA", "RGB", "RGBA"):
        precision = _precision(data)
        if precision < 8:
            table = _scale(_shifted_white(precision, bits=8), length=256)
            return image.point(table.tolist() * len(image.getbands()))
    return image


def _grey(image: Image.Image, data: bytes) -> Image.Image:
    samples = np.asarray(image)
    if image.mode == "F":
        grey = _of_floats(samples)
    else:
        grey = _of_integers(samples, _white(image, data))
    if _photometric(image) == _WHITE_IS_ZERO:
        grey = 255 - grey
    result = Image.fromarray(grey)
    if (transparent := image.info.get("transparency")) is not None:
        opaque = np.where(samples == transparent, 0, 255).astype(np.uint8)
        result.putalpha(Image.fromarray(opaque))
    return result


def _of_integers(samples: np.ndarray, white: int) -> np.ndarray:
    # Pillow keeps 32-bit samples in signed integers; a table of them would be too large.
    if white > 65535:
        return np.rint(samples.view(np.uint32) * (255 / white)).astype(np.uint8)
    return _scale(white, length=65536)[samples]


def _of_floats(samples: np.ndarray) -> np.ndarray:
    low = float(samples.min())
    high = float(samples.max())
    # Negated, so that it also refuses NaN, which fails every comparison.
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"its floating point values go from {low:g} to {high:g}: 0 (black) to 1 (white) "
            "is needed"
        )
    return np.rint(samples * np.float32(255)).astype(np.uint8)


def _scale(white: int, *, length: int) -> np.ndarray:
    """Lookup table of 8-bit values for samples 0 to `length` - 1, with 255 for `white`: uint8
    [length]."""
    return np.rint(np.minimum(np.arange(length), white) * (255 / white)).astype(np.uint8)


def _white(image: Image.Image, data: bytes) -> int:
    """Sample value of white in a grey file, as Pillow decodes it."""
    if isinstance(image, TiffImageFile):
        return int(2 ** image.tag_v2[BITSPERSAMPLE][0] - 1)
    if image.format == "JPEG2000":
        return _shifted_white(_precision(data), bits=16)
    return 65535


def _shifted_white(precision: int, *, bits: int) -> int:
    """White of `precision` bits, shifted to the top of `bits` as Pillow does for JPEG 2000."""
    return (2**precision - 1) << max(bits - precision, 0)


def _precision(data: bytes) -> int:
    """Bits of the first component of a JPEG 2000 file."""
    place = data.find(_SIZ)
    return (data[place + _FIRST_PRECISION] & 0x7F) + 1


def _photometric(image: Image.Image) -> int | None:
    if isinstance(image, TiffImageFile):
        return image.tag_v2.get(PHOTOMETRIC_INTERPRETATION)
    return None


def _transparent(image: Image.Image, *, bits: int) -> int | tuple[int, ...] | bytes:
    """Transparent colour of a PNG of `bits`, at the depth of its decoded pixels."""
    color = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        return int(color) * (255 // (2**bits - 1))
    if image.mode == "RGB" and bits == 16:
        return tuple(value >> 8 for value in color)
    return color
