"""Display of videos: the display matrix, and the choice of the video stream."""

import io
import itertools
import math
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from megatron_vita.errors import DataError
from megatron_vita.media.video import decode_frames, probe_video
from tests.media.video_files import clip

SIDE = 64
Matrix = tuple[int, int, int, int]
RIGHT_ANGLES: list[Matrix] = [
    *[(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)],
    *[(0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2)],
]
CORNERS = {(-1, -1): "R", (1, -1): "G", (-1, 1): "B", (1, 1): "W"}
"""Colours of the stored picture's quarters, by the signs of x and y from its middle."""


def quarters(picture: np.ndarray, index: int) -> None:
    half = picture.shape[0] // 2
    picture[:half, :half] = (250, 0, 0)
    picture[:half, half:] = (0, 250, 0)
    picture[half:, :half] = (0, 0, 250)
    picture[half:, half:] = 250


def shown(data: bytes) -> str:
    """The colours of the quarters of a video's first frame, row by row."""
    (tile,) = decode_frames(data, "clip", times=[0.0], tile_size=SIDE)
    quarter = SIDE // 4
    colors = [tile[:, y, x] for y in (quarter, -quarter) for x in (quarter, -quarter)]
    return "".join("W" if min(color) > 150 else "RGB"[int(np.argmax(color))] for color in colors)


def moved_by(matrix: Matrix) -> str:
    """As ISO 14496-12 moves the quarters: (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    moved = {(a * x + c * y, b * x + d * y): color for (x, y), color in CORNERS.items()}
    return "".join(moved[place] for place in CORNERS)


def with_matrix(file_format: str, matrix: tuple[float, ...]) -> bytes:
    """A video whose container carries this display matrix."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    whole = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    return clip(file_format, frames=2, paint=quarters, matrix=whole)


@pytest.mark.parametrize("file_format", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("matrix", RIGHT_ANGLES)
def test_a_display_matrix_turns_and_mirrors(file_format: str, matrix: Matrix) -> None:
    assert shown(with_matrix(file_format, matrix)) == moved_by(matrix)


@pytest.mark.parametrize(
    ("orientation", "right"),
    [
        ("rotate=90", "GWRB"),
        ("rotate=0:flip=horizontal", "GRWB"),
        ("rotate=0:flip=vertical", "BWRG"),
        ("rotate=180", "WBGR"),
    ],
)
def test_the_display_orientation_of_a_codec_turns_and_mirrors(orientation: str, right: str) -> None:
    with av.open(io.BytesIO(clip("mpegts", frames=20, paint=quarters))) as container:
        stream = container.streams.video[0]
        option = f"h264_metadata=display_orientation=insert:{orientation}"
        bsf = BitStreamFilterContext(option, stream)
        packets = [bsf.filter(packet) for packet in container.demux(stream) if packet.size]
    data = b"".join(bytes(packet) for packet in itertools.chain.from_iterable(packets))
    assert shown(data) == right


def test_a_matrix_that_also_scales_turns_alike_and_a_singular_one_does_not_turn() -> None:
    assert shown(with_matrix("mp4", (0, 2, -2, 0))) == moved_by((0, 1, -1, 0))
    assert shown(with_matrix("mp4", (-0.5, 0, 0, 0.5))) == moved_by((-1, 0, 0, 1))
    assert shown(with_matrix("mp4", (1, 0, 0, 0))) == "RGBW"


def test_a_matrix_of_an_odd_angle_is_refused_by_name() -> None:
    for degrees in (30, 91, 181):
        cos = math.cos(math.radians(degrees))
        sin = math.sin(math.radians(degrees))
        with pytest.raises(DataError, match=f"^clip: its display matrix turns by {degrees} deg"):
            shown(with_matrix("mp4", (cos, sin, -sin, cos)))


def cover() -> av.Packet:
    """A JPEG as a packet."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width = encoder.height = 16
    encoder.pix_fmt = "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 255, np.uint8))
    frame = frame.reformat(format="yuvj420p")
    frame.pts = 0
    (packet,) = [*encoder.encode(frame), *encoder.encode()]
    packet.pts = packet.dts = 0
    return packet


def several(file_format: str, *kinds: str) -> bytes:
    """A file of streams: a `cover`, `sound`, or a side in pixels, with `*` if it is the default."""
    file = io.BytesIO()
    with av.open(file, "w", format=file_format) as container:
        streams: list[Any] = [_add_stream(container, kind) for kind in kinds]
        for kind, stream in zip(kinds, streams, strict=True):
            if kind == "cover":
                packet = cover()
                packet.stream = stream
                container.mux(packet)
        for index, (kind, stream) in itertools.product(range(20), zip(kinds, streams, strict=True)):
            if kind == "sound":
                container.mux(stream.encode(_silence(index)))
            elif kind != "cover":
                picture = np.zeros((stream.height, stream.width, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts = index
                container.mux(stream.encode(frame))
        for kind, stream in zip(kinds, streams, strict=True):
            if kind != "cover":
                container.mux(stream.encode())
    return file.getvalue()


def _add_stream(container: av.container.OutputContainer, kind: str) -> av.stream.Stream:
    if kind == "sound":
        return container.add_stream("flac", rate=8000, layout="mono")
    is_cover = kind == "cover"
    stream = container.add_stream("mjpeg" if is_cover else "libx264", rate=25)
    stream.width = stream.height = 16 if is_cover else int(kind.strip("*"))
    stream.pix_fmt = "yuvj420p" if is_cover else "yuv420p"
    stream.disposition = Disposition.default if kind.endswith("*") else Disposition(0)
    if is_cover:
        stream.disposition = Disposition.attached_pic
    return stream


def _silence(index: int) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
    frame.sample_rate = 8000
    frame.pts = 800 * index
    return frame


@pytest.mark.parametrize(
    ("file_format", "kinds", "side"),
    [
        ("mp4", ("16", "64*"), 64),
        ("mp4", ("64", "16*"), 16),
        ("matroska", ("16", "64*"), 64),
        ("mp4", ("cover", "32"), 32),
        ("matroska", ("cover", "32"), 32),
        ("mpegts", ("64", "16"), 64),
    ],
)
def test_of_several_video_streams_the_best_by_ffmpeg_is_read(
    file_format: str, kinds: tuple[str, ...], side: int
) -> None:
    data = several(file_format, *kinds)
    assert probe_video(data, "several").size == (side, side)
    tile = decode_frames(data, "several", times=[0.5], tile_size=16)
    assert tile.max() < 10  # the cover is white


def test_sound_with_a_cover_picture_is_refused_by_name() -> None:
    for file_format in ("mp4", "flac"):
        data = several(file_format, "sound", "cover")
        for read in (probe_video, lambda *of: decode_frames(*of, times=[0.0], tile_size=16)):
            with pytest.raises(DataError, match=r"song.m4a: no video stream.*attached picture"):
                read(data, "song.m4a")
