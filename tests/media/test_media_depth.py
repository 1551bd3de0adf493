"""Depth of images: white is the largest value that the file says it can hold."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media.images import open_image
from tests.media.picture_files import file_of, png_of, tiff_of
from tests.media.video_files import same_scheduling


def greys(data: bytes) -> list[int]:
    """The first row of an image that is grey."""
    pixels = np.asarray(open_image(data, "grey"))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def expected(values: list[int], white: int) -> list[int]:
    return [round(255 * value / white) for value in values]


@pytest.mark.parametrize("white", [1, 3, 100, 255, 256, 1023, 4095, 65534, 65535])
@pytest.mark.parametrize("kind", ["P5", "P2", "P6", "P3"])
def test_portable_maps_are_scaled_by_their_maxval(kind: str, white: int) -> None:
    values = [white // 3, white // 3, white // 2, white]
    samples = np.repeat(values, 3 if kind in ("P6", "P3") else 1)
    body = " ".join(map(str, samples)).encode()
    if kind in ("P5", "P6"):
        body = samples.astype(">u2" if white > 255 else "u1").tobytes()
    assert greys(f"{kind}\n4 1\n{white}\n".encode() + body) == expected(values, white)


def packed(values: list[int], bits: int, order: str) -> bytes:
    """Samples of 1 to 32 bits, the first one in the highest bits of a byte."""
    if bits >= 16:
        return np.array(values, f"{order}u{bits // 8}").tobytes()
    text = "".join(f"{value:0{bits}b}" for value in values)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


@pytest.mark.parametrize(
    ("bits", "photometric", "orders"),
    [
        *[(bits, photometric, "<>") for bits in (1, 2, 4, 8) for photometric in (0, 1)],
        (12, 1, "<"),
        (16, 1, "<>"),
        (16, 0, "<"),
        (32, 1, "<"),
    ],
)
def test_grey_tiffs_are_scaled_by_their_bits(bits: int, photometric: int, orders: str) -> None:
    white = 2**bits - 1
    values = [0, white // 3, white // 2, white, white, 0, 0, white]
    right = expected(values, white)
    for order in orders:
        plane = packed(values, bits, order)
        data = tiff_of([plane], (8, 1), order=order, t258=bits, t262=photometric)
        assert greys(data) == (right if photometric else [255 - value for value in right])


def test_the_orientation_of_a_deep_tiff_is_kept() -> None:
    data = tiff_of([packed([0, 30000, 65535], 16, ">")], (3, 1), order=">", t258=16, t262=1, t274=6)
    assert np.asarray(open_image(data, "tall"))[:, 0, 0].tolist() == [0, 117, 255]


def test_floating_point_grey_goes_from_0_to_1_and_a_constant_one_is_no_black() -> None:
    def tiff(values: list[float], photometric: int = 1) -> bytes:
        plane = np.array(values, "<f4").tobytes()
        return tiff_of([plane], (len(values), 1), t258=32, t262=photometric, t339=3)

    assert greys(tiff([0.0, 0.25, 1.0])) == [0, 64, 255]
    assert greys(tiff([0.0, 0.25, 1.0], photometric=0)) == [255, 191, 0]
    assert greys(tiff([0.5, 0.5])) == [128, 128]
    assert greys(b"Pf\n2 1\n-1.0\n" + np.array([0.0, 1.0], "<f4").tobytes()) == [0, 255]
    for odd in (-1.0, 7.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"deep.tif.*floating point values go from"):
            open_image(tiff([0.0, odd]), "deep.tif")


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_samples_are_refused_by_name(bits: int) -> None:
    data = tiff_of([bytes(bits // 8 * 4)], (4, 1), t258=bits, t262=1, t339=2)
    with pytest.raises(DataError, match=r"deep.tif.*signed integers"):
        open_image(data, "deep.tif")


@pytest.mark.parametrize(
    ("bits", "photometric", "order"), [(10, 1, "<"), (12, 0, "<"), (12, 1, ">"), (64, 1, "<")]
)
def test_what_pillow_does_not_know_of_a_kind_is_refused_by_the_kind(
    bits: int, photometric: int, order: str
) -> None:
    data = tiff_of([bytes(64)], (4, 1), order=order, t258=bits, t262=photometric)
    with pytest.raises(DataError, match=r"deep.tif.*TIFF: .*unknown pixel mode"):
        open_image(data, "deep.tif")


def test_colours_of_16_bits_keep_their_range_interleaved_and_in_planes() -> None:
    colors = np.array([[0, 257, 32896], [65535, 8000, 60000]], "<u2")
    right = np.rint(colors / 257).astype(int)
    interleaved = tiff_of([colors.tobytes()], (2, 1), t258=[16] * 3, t262=2, t277=3, t278=1)
    planes = [zlib.compress(colors[:, band].tobytes()) for band in range(3)]
    apart = tiff_of(planes, (2, 1), t258=[16] * 3, t262=2, t284=2, t259=8)
    png = png_of([colors.astype(">u2").tobytes()], 2, bits=16, color=2)
    for data in (interleaved, apart, png):
        assert abs(np.asarray(open_image(data, "deep"))[0].astype(int) - right).max() <= 1
    raw = tiff_of(
        [colors[:, band].tobytes() for band in range(3)], (2, 1), t258=[16] * 3, t262=2, t284=2
    )
    with pytest.raises(DataError, match=r"deep.tif.*planes of more than 8 bits"):
        open_image(raw, "deep.tif")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_value_that_a_png_calls_transparent_is_white_and_no_other(bits: int) -> None:
    white = 2**bits - 1
    clear = white // 3
    values = [clear, 0, white] if clear else [0, 1, 1]
    row = packed(values, bits, ">")
    right = [255, *expected(values[1:], white)]
    assert greys(png_of([row], 3, bits=bits, color=0, tRNS=struct.pack(">H", clear))) == right
    assert greys(png_of([row], 3, bits=bits, color=0)) == expected(values, white)


def test_a_deep_colour_that_a_png_calls_transparent_is_white() -> None:
    colors = np.array([[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x0ABC]], ">u2")
    data = png_of([colors.tobytes()], 2, bits=16, color=2, tRNS=colors[0].tobytes())
    assert np.asarray(open_image(data, "deep"))[0].tolist() == [[255] * 3, [0x12, 0x56, 0x0A]]


def test_grey_of_16_bits_with_alpha_is_laid_over_white() -> None:
    pairs = np.array([[65535, 0], [0, 65535], [32896, 65535], [0, 32896]], ">u2")
    assert greys(png_of([pairs.tobytes()], 4, bits=16, color=4)) == [255, 0, 128, 127]


def jpeg2000(value: int, bits: int) -> bytes:
    """A grey JPEG 2000 of one value, by FFmpeg's encoder."""
    encoder = av.CodecContext.create("jpeg2000", "w")
    encoder.width = encoder.height = 16
    encoder.pix_fmt = "gray" if bits == 8 else f"gray{bits}le"
    encoder.time_base = Fraction(1)
    frame = av.VideoFrame(16, 16, encoder.pix_fmt)
    frame.planes[0].update(
        value.to_bytes(1 if bits == 8 else 2, "little")
        * (frame.planes[0].buffer_size // (1 + (bits > 8)))
    )
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_jpeg_2000_is_scaled_by_the_precision_of_its_samples(bits: int) -> None:
    white = 2**bits - 1
    for value in (0, white // 3, white // 2, white):
        assert set(greys(jpeg2000(value, bits))) == {round(255 * value / white)}


def test_jpeg_2000_of_4_bits_reaches_white() -> None:
    for value, right in ((0, 0), (192, 12 * 17), (255, 255)):
        data = jpeg2000(value, 8)
        codestream = bytearray(data[data.index(b"\xff\x4f\xff\x51") :])
        codestream[42] = 3  # bits less one; the wavelets' steps are in parts of the range
        assert set(greys(bytes(codestream))) == {right}


def test_avif_of_10_bits_reaches_white() -> None:
    file = io.BytesIO()
    with same_scheduling(), av.open(file, "w", format="avif") as container:
        stream = container.add_stream("libsvtav1", rate=1, options={"preset": "12"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p10le"
        picture = np.full((64, 64, 3), 65535, np.uint16)
        picture[:, 32:] = 0
        frame = av.VideoFrame.from_ndarray(picture, format="rgb48le")
        container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        container.mux(stream.encode())
    row = greys(file.getvalue())
    assert min(row[8:24]) >= 253
    assert max(row[40:56]) <= 2


def test_heic_is_refused_by_name() -> None:
    data = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(64)
    with pytest.raises(DataError, match=r"photo.heic.*none of the kinds"):
        open_image(data, "photo.heic")


def test_a_jpeg_of_12_bits_is_refused_by_name() -> None:
    data = bytearray(file_of(Image.new("L", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 4] = 12
    with pytest.raises(DataError, match=r"deep.jpg.*JPEG: .*12-bit"):
        open_image(bytes(data), "deep.jpg")
