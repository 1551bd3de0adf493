"""Image files: upright RGB from every kind, and errors that name the image."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media import images
from megatron_vita.media.images import image_size, open_image, read_pixels
from tests.media.picture_files import exif_of, file_of, photograph

CORNERS = {"red": (0, 0), "lime": (1, 0), "blue": (0, 1), "white": (1, 1)}
"""Colours of a test picture's quarters, by column and row."""

# Where each quarter of the upright picture is stored, by EXIF orientation, as a Pillow operation on
# the upright one.
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


def assert_quarters(image: Image.Image, tolerance: int = 40) -> None:
    assert (image.mode, image.size) == ("RGB", (48, 32))
    difference = np.asarray(image).astype(int) - np.asarray(quarters())
    inner = np.concatenate([difference[4:12], difference[20:28]])[
        :, [*range(4, 20), *range(28, 44)]
    ]
    assert abs(inner).max() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    stored = quarters().transpose(STORED[orientation]) if orientation > 1 else quarters()
    data = file_of(stored, kind, exif=exif_of(orientation))
    assert_quarters(open_image(data, "picture"))
    assert image_size(data, "picture") == (48, 32)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_unknown_orientation_leaves_the_image_as_it_is(orientation: int) -> None:
    data = file_of(quarters(), "PNG", exif=exif_of(orientation))
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
        pixels = open_image(
            file_of(image.convert(mode), "TIFF" if mode == "PA" else "PNG"), "picture"
        )
        assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert open_image(file_of(image, "PNG"), "picture").getpixel((1, 0)) == (255, 0, 0)


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = open_image(file_of(image, "PNG", transparency=0), "picture")
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("P", "GIF")]
)
def test_other_colour_spaces_become_rgb(mode: str, kind: str) -> None:
    assert_quarters(open_image(file_of(quarters().convert(mode), kind), "picture"), tolerance=60)


def test_grey_and_bilevel_images_become_rgb() -> None:
    assert open_image(file_of(Image.new("L", (3, 2), 77), "PNG"), "picture").getpixel((0, 0)) == (
        77,
        77,
        77,
    )
    assert open_image(file_of(Image.new("1", (3, 2), 1), "PNG"), "picture").getpixel((0, 0)) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = np.asarray(open_image(file_of(Image.fromarray(values), kind), "picture"))
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


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


def test_a_decompression_bomb_is_refused_by_name_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kind in ("PNG", "JPEG"):
        data = file_of(Image.new("L", (100, 100)), kind)
        monkeypatch.setattr(images, "MAX_PIXELS", 10000)
        read_pixels(data, "bomb.png")
        monkeypatch.setattr(images, "MAX_PIXELS", 9999)
        monkeypatch.setattr(Image.Image, "load", None)
        for read in (read_pixels, image_size):
            with pytest.raises(DataError, match=r"bomb\.png.*100 x 100 pixels.*9999"):
                read(data, "bomb.png")
        monkeypatch.undo()


def test_a_bomb_of_a_real_size_is_refused() -> None:
    data = bytearray(file_of(Image.new("L", (1, 1)), "BMP"))
    data[18:26] = (60000).to_bytes(4, "little") * 2
    with pytest.raises(DataError, match=r"bomb\.bmp"):
        read_pixels(bytes(data), "bomb.bmp")


def test_sides_of_thirty_thousand_pixels_are_read() -> None:
    for size in ((30000, 20), (20, 30000)):
        for kind in ("JPEG", "PNG"):
            assert read_pixels(file_of(Image.new("RGB", size, "red"), kind), "long").size == size


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    pixel = open_image(data, "several").getpixel((8, 8))
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX"])
def test_unusual_kinds_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match=r"drawing: cannot read"):
        open_image(file_of(quarters(), kind), "drawing")


def by_pillow(data: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:
        return None


PLAIN = [
    {"quality": 90},
    {"quality": 100, "subsampling": 0},
    {"quality": 75, "subsampling": 1},
    {"quality": 30, "progressive": True},
    {"quality": 85, "optimize": True, "restart_marker_blocks": 3},
    {"quality": 85, "keep_rgb": True},
]


@pytest.mark.parametrize("options", PLAIN)
@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr"])
def test_ordinary_jpegs_are_read_without_pillow_and_bit_for_bit_as_by_it(
    options: dict, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        file_of(photograph(size).convert(mode), "JPEG", **options)
        for size in ((64, 48), (333, 217), (1, 9))
    ]
    expected = [by_pillow(data) for data in files]
    monkeypatch.setattr(Image.Image, "load", None)
    for data, pixels in zip(files, expected, strict=True):
        assert (read_pixels(data, "plain").stored == pixels).all()


def test_damaged_jpegs_are_refused_where_pillow_refuses_them_and_else_read_alike() -> None:
    generator = np.random.default_rng(0)
    outcomes = []
    for number in range(240):
        data = bytearray(file_of(photograph((90, 70), number), "JPEG", progressive=number % 2 == 0))
        for place in generator.integers(0, len(data), number % 4):
            data[place] = generator.integers(0, 256)
        if number % 3 == 0:
            del data[int(generator.integers(len(data) // 2, len(data) + 1)) :]
        if number % 5 == 0:
            data += b"more"
        expected = by_pillow(bytes(data))
        try:
            found = read_pixels(bytes(data), "picture").stored
        except DataError:
            found = None
        outcomes.append(found is None)
        assert (found is None) == (expected is None)
        if expected is not None and found is not None:
            assert (found == expected).all()
    assert 30 < sum(outcomes) < 210


def test_a_faultless_jpeg_that_simplejpeg_does_not_take_is_read_by_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("not this one")

    data = file_of(photograph((40, 30)), "JPEG")
    expected = read_pixels(data, "picture").stored
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    assert (read_pixels(data, "picture").stored == expected).all()


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
