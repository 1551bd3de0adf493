"""The processor that exports carry takes the frames of video files that training takes: the same
stream, the same times, as upright."""

import io
import math
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_vita.convert.exported.media_vita import FrameSampling, frames_of
from megatron_vita.media.video import decode_frames
from tests.media.test_media_display import (
    RIGHT_ANGLES,
    SIDE,
    Matrix,
    moved_by,
    several,
    shown,
    with_matrix,
)
from tests.media.video_files import clip, damage


def frames_at(path: Path, data: bytes, *, max_fps: float = 2.0) -> list[np.ndarray]:
    """Frames that the processor takes of a file with this content."""
    path.write_bytes(data)
    return frames_of(path, FrameSampling(max_fps=max_fps, max_frames=128, wanted=None))


def numbers(frames: list[np.ndarray]) -> list[int]:
    """Numbers of frames of a clip, whose brightness is four times as much."""
    return [round(float(frame.mean()) / 4) for frame in frames]


MIDDLES = [6, 18, 31, 43]
"""Frames of 2 seconds that are shown in the middles of 4 parts."""


@pytest.mark.parametrize("file_format", ["mpegts", "mp4", "matroska", "flv", "avi"])
def test_frames_are_those_shown_at_their_times(file_format: str, tmp_path: Path) -> None:
    assert numbers(frames_at(tmp_path / "clip", clip(file_format, frames=50))) == MIDDLES


def hide(data: bytes, which: int) -> bytes:
    """Clear `show_frame` of a frame of VP8, so that its packet yields none."""
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start = data.index(bytes(packets[which]), packets[which].pos)
    return data[:start] + bytes([data[start] & ~0x10]) + data[start + 1 :]


@pytest.mark.parametrize(("which", "right"), [(22, MIDDLES), (31, [6, 18, 30, 43])])
def test_a_packet_that_yields_no_frame_shifts_no_other(
    which: int, right: list[int], tmp_path: Path
) -> None:
    data = hide(clip("webm", "libvpx", frames=50, options={"crf": "4", "b": "10M"}), which)
    frames = frames_at(tmp_path / "clip", data)
    tiles = decode_frames(data, "clip", times=[0.25, 0.75, 1.25, 1.75], tile_size=SIDE)
    assert numbers(frames) == numbers(list(tiles)) == right


# Key frames are 10 apart: no wanted frame needs this packet.
@pytest.mark.parametrize("file_format", ["mpegts", "mp4"])
def test_a_damaged_packet_shifts_no_other_frame(file_format: str, tmp_path: Path) -> None:
    data = damage(clip(file_format, frames=50), range(22, 23))
    assert numbers(frames_at(tmp_path / "clip", data)) == MIDDLES


def test_wanted_frames_that_cannot_be_decoded_are_named_by_time(tmp_path: Path) -> None:
    data = damage(clip("matroska", "mjpeg", frames=50), range(31, 32))
    with pytest.raises(ValueError, match=r"clip\.mkv: 1 of 4 frames .*, at 1\.240 seconds: "):
        frames_at(tmp_path / "clip.mkv", data)


def test_a_loss_among_frames_without_times_of_their_own_is_refused(tmp_path: Path) -> None:
    data = damage(clip("avi", frames=50), range(22, 23))
    with pytest.raises(ValueError, match=r"clip\.avi: \d+ of 50 frames can be decoded, and no"):
        frames_at(tmp_path / "clip.avi", data)


@pytest.mark.parametrize("matrix", RIGHT_ANGLES)
def test_display_matrices_turn_and_mirror_as_in_training(matrix: Matrix, tmp_path: Path) -> None:
    data = with_matrix("mp4", matrix)
    (frame,) = frames_at(tmp_path / "clip", data, max_fps=1)
    (tile,) = decode_frames(data, "clip", times=[0.05], tile_size=SIDE)
    assert shown(data) == moved_by(matrix)
    assert np.array_equal(frame, tile.transpose(1, 2, 0))


def test_matrices_that_scale_collapse_or_turn_oddly_are_taken_as_in_training(
    tmp_path: Path,
) -> None:
    for matrix in ((0, 2, -2, 0), (-0.5, 0, 0, 0.5), (1, 0, 0, 0)):
        data = with_matrix("mp4", matrix)
        (frame,) = frames_at(tmp_path / "clip", data, max_fps=1)
        (tile,) = decode_frames(data, "clip", times=[0.05], tile_size=SIDE)
        assert np.array_equal(frame, tile.transpose(1, 2, 0)), matrix
    cos = math.cos(math.radians(30))
    with pytest.raises(ValueError, match="clip: its display matrix turns by 30 degrees"):
        frames_at(tmp_path / "clip", with_matrix("mp4", (cos, 0.5, -0.5, cos)))


@pytest.mark.parametrize(
    ("kinds", "side"), [(("cover", "32"), 32), (("16", "64*"), 64), (("32", "cover"), 32)]
)
def test_the_stream_is_the_one_of_training(
    kinds: tuple[str, ...], side: int, tmp_path: Path
) -> None:
    (frame,) = frames_at(tmp_path / "clip", several("mp4", *kinds), max_fps=1)
    assert frame.shape == (side, side, 3)
    assert frame.max() < 10  # the cover is white


def test_a_file_with_a_cover_picture_alone_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"song\.m4a: has no video stream"):
        frames_at(tmp_path / "song.m4a", several("mp4", "sound", "cover"))
