"""Pictures and their files for the tests of media."""

import io
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
