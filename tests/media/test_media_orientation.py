"""The orientation of an image, wherever its format keeps it."""

import struct
import zlib

import pytest
from PIL import Image

from megatron_vita.media.images import image_size, open_image
from tests.media.picture_files import exif_of, file_of, png_chunk

WIDE = Image.new("RGB", (48, 32), "red")
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def assert_upright(data: bytes, *, turned: bool = True) -> None:
    size = (32, 48) if turned else (48, 32)
    assert open_image(data, "picture").size == size
    assert image_size(data, "picture") == size


def png(*, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with chunks before and after its pixels."""
    data = file_of(WIDE, "PNG")
    start = data.index(b"IDAT") - 4
    end = data.index(b"IEND") - 4
    return data[:start] + before + data[start:end] + after + data[end:]


EXIF = exif_of(6).tobytes().removeprefix(b"Exif\0\0")
RAW_PROFILE = b"\nexif\n%8d\n%s\n" % (len(EXIF) + 6, (b"Exif\0\0" + EXIF).hex().encode())
PNG_METADATA = {
    "eXIf": png_chunk(b"eXIf", EXIF),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
    "raw profile": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
}


@pytest.mark.parametrize("kind", PNG_METADATA)
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_png_is_turned_by_metadata_on_either_side_of_its_pixels(kind: str, where: str) -> None:
    assert_upright(png(**{where: PNG_METADATA[kind]}))


def test_other_text_behind_the_pixels_of_a_png_turns_nothing() -> None:
    assert_upright(png(after=png_chunk(b"tEXt", b"date:create\0today")), turned=False)
    assert_upright(png(after=png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), turned=False)


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def jpeg(*segments: bytes) -> bytes:
    """A JPEG whose APP1 segments are these."""
    data = file_of(WIDE, "JPEG")
    return data[:2] + b"".join(map(segment, segments)) + data[2:]


def test_a_jpeg_with_several_app1_segments_is_turned_by_the_one_that_tells() -> None:
    turned = b"Exif\0\0" + EXIF
    other = Image.Exif()
    other[0x010F] = "a camera"
    silent = b"Exif\0\0" + other.tobytes().removeprefix(b"Exif\0\0")
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + XMP.replace('"6"', '"3"').encode()
    for segments in ((turned,), (xmp, turned), (turned, xmp), (silent, turned), (turned, silent)):
        assert_upright(jpeg(*segments))
    assert_upright(jpeg(silent), turned=False)


def test_an_avif_is_turned_by_its_own_properties() -> None:
    for orientation in range(1, 9):
        data = file_of(WIDE, "AVIF", exif=exif_of(orientation))
        assert (b"irot" in data or b"imir" in data) == (orientation > 1)
        assert_upright(data, turned=orientation >= 5)


@pytest.mark.parametrize("order", ["<", ">"])
def test_webp_and_tiff_are_turned_in_either_byte_order(order: str) -> None:
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    mark = b"II" if order == "<" else b"MM"
    exif = mark + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)
    assert_upright(file_of(WIDE, "WEBP", exif=exif))
    assert_upright(file_of(WIDE, "JPEG", exif=b"Exif\0\0" + exif))
