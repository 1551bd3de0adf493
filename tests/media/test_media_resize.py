"""Resizing: what Pillow makes of the same picture, and the same on every processor."""

import hashlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from megatron_vita.media.images import Pixels, open_image, read_pixels
from megatron_vita.media.resize import fitting_size, letterboxed, squashed
from tests.environment import environment_with
from tests.media.picture_files import exif_of, file_of, photograph

BICUBIC = Image.Resampling.BICUBIC
SIZES = [
    ((1333, 1000), (448, 336)),
    ((1000, 1333), (896, 448)),  # much taller than wanted: Pillow resizes columns first
    ((200, 3000), (448, 448)),
    ((3000, 200), (448, 448)),
    ((90, 40), (448, 448)),
    ((3, 2), (448, 448)),
    ((1, 1), (56, 56)),
    ((30000, 40), (448, 448)),
    ((448, 448), (448, 448)),
]


def by_pillow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, BICUBIC)).transpose(2, 0, 1).astype(int)


def black_and_white(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise * 255)


@pytest.mark.parametrize("picture", [photograph, black_and_white])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_pixels_are_pillows_but_for_one_step(
    before: tuple[int, int],
    after: tuple[int, int],
    picture: Callable[[tuple[int, int]], Image.Image],
) -> None:
    image = picture(before)
    difference = np.abs(squashed(Pixels(np.array(image), 1), after) - by_pillow(image, after))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


def test_a_large_photograph_differs_from_pillows_by_one_at_most() -> None:
    image = photograph((4000, 3000))
    for size in ((1792, 1344), (448, 448)):
        difference = np.abs(squashed(Pixels(np.array(image), 1), size) - by_pillow(image, size))
        assert difference.max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(301, 200), (200, 301), (64, 700)])
def test_a_turned_picture_is_as_if_turned_before_it_is_resized(
    orientation: int, size: tuple[int, int]
) -> None:
    data = file_of(photograph(size, grain=90), "PNG", exif=exif_of(orientation))
    upright = open_image(data, "picture")
    pixels = read_pixels(data, "picture")
    assert pixels.size == upright.size
    assert np.abs(squashed(pixels, (112, 84)) - by_pillow(upright, (112, 84))).max() <= 1
    width, height = fitting_size(upright.size, (60, 60))
    boxed = letterboxed(pixels, (60, 60), (1, 2, 3))
    left = (60 - width) // 2
    top = (60 - height) // 2
    inside = boxed[:, top : top + height, left : left + width]
    assert np.abs(inside - by_pillow(upright, (width, height))).max() <= 1
    assert boxed[:, 0, 0].tolist() == [1, 2, 3] or (left, top) == (0, 0)


def test_a_picture_fits_into_a_box_with_its_larger_side() -> None:
    assert fitting_size((1280, 720), (448, 448)) == (448, 252)
    assert fitting_size((720, 1280), (448, 448)) == (252, 448)
    assert fitting_size((10, 10), (448, 448)) == (448, 448)
    assert fitting_size((30000, 1), (448, 448)) == (448, 1)


def test_processors_without_vector_instructions_give_the_same_pixels() -> None:
    image = photograph((777, 555))
    pixels = squashed(Pixels(np.array(image), 1), (448, 336))
    code = (
        "import hashlib, sys, numpy as np; from tests.media.picture_files import photograph;"
        "from megatron_vita.media.images import Pixels; from megatron_vita.media.resize import squashed;"
        "pixels = squashed(Pixels(np.array(photograph((777, 555))), 1), (448, 336));"
        "print(hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest())"
    )
    env = environment_with(ATEN_CPU_CAPABILITY="default")
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()
