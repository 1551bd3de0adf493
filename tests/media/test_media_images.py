"""Image files: upright RGB from every kind, and errors that name the image."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media.images import image_size, open_image

CORNERS = {"red": (0, 0), "lime": (1, 0), "blue": (0, 1), "white": (1, 1)}
"""Colours of a test picture's quarters, by column and row."""

# Where each quarter of the upright picture is stored, by EXIF orientation, as a Pillow operation on the upright one.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters() -> Image.Image:
    image = Image.new("RGB", (48, 32))
    for color, (col, row) in CORNERS.items():
        image.paste(color, (col * 24, row * 16, col * 24 + 24, row * 16 + 16))
    return image


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_quarters(image: Image.Image, tolerance: int = 40) -> None:
    assert (image.mode, image.size) == ("RGB", (48, 32))
    difference = np.asarray(image).astype(int) - np.asarray(quarters())
    inner = np.concatenate([difference[4:12], difference[20:28]])[:, [*range(4, 20), *range(28, 44)]]
    assert abs(inner).max() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    stored = quarters().transpose(STORED[orientation]) if orientation > 1 else quarters()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, kind, exif=exif)
    assert_quarters(open_image(data, "picture"))
    assert image_size(data, "picture") == (48, 32)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_unknown_orientation_leaves_the_image_as_it_is(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(quarters(), "PNG", exif=exif)
    assert_quarters(open_image(data, "picture"), tolerance=0)
    assert image_size(data, "picture") == (48, 32)


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = file_of(quarters(), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert_quarters(open_image(data, "picture"))
    assert image_size(data, "picture") == (48, 32)


def test_transparent_pixels_lie_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    for mode in ("RGBA", "LA", "PA"):
        pixels = open_image(file_of(image.convert(mode), "TIFF" if mode == "PA" else "PNG"), "picture")
        assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert open_image(file_of(image, "PNG"), "picture").getpixel((1, 0)) == (255, 0, 0)


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = open_image(file_of(image, "PNG", transparency=0), "picture")
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("P", "GIF")])
def test_other_colour_spaces_become_rgb(mode: str, kind: str) -> None:
    assert_quarters(open_image(file_of(quarters().convert(mode), kind), "picture"), tolerance=60)


def test_grey_and_bilevel_images_become_rgb() -> None:
    assert open_image(file_of(Image.new("L", (3, 2), 77), "PNG"), "picture").getpixel((0, 0)) == (77, 77, 77)
    assert open_image(file_of(Image.new("1", (3, 2), 1), "PNG"), "picture").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = np.asarray(open_image(file_of(Image.fromarray(values), kind), "picture"))
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_floating_point_grey_is_stretched_and_constant_one_is_black() -> None:
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    pixels = np.asarray(open_image(file_of(Image.fromarray(values), "TIFF"), "picture"))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
    constant = np.asarray(open_image(file_of(Image.fromarray(values[:, :1] * 7), "TIFF"), "picture"))
    assert constant.tolist() == [[[0, 0, 0]]]


def test_a_truncated_jpeg_is_refused_by_name_though_its_size_can_be_read() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = file_of(noise, "JPEG")
    half = data[: len(data) // 2]
    assert image_size(half, "half.jpg") == (64, 64)
    with pytest.raises(DataError, match=f"half.jpg.*{len(half)} bytes.*truncated"):
        open_image(half, "half.jpg")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_image_is_refused_by_name(data: bytes) -> None:
    for read in (open_image, image_size):
        with pytest.raises(DataError, match=r"odd\.png"):
            read(data, "odd.png")


def test_a_decompression_bomb_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("L", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    for read in (open_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png.*10000 pixels"):
            read(data, "bomb.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_damaged_bytes_raise_nothing_but_data_errors(kind: str) -> None:
    data = file_of(quarters(), kind)
    generator = np.random.default_rng(0)
    messages = []
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 5):
            damaged[place] = generator.integers(0, 256)
        for read in (open_image, image_size):
            try:
                read(bytes(damaged), "picture")
            except DataError as error:
                messages.append(str(error))
    assert all(message.startswith("picture: ") for message in messages)
