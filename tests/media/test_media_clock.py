"""Videos whose time stamps jump: one clock for counting, sampling and decoding."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_vita.media.clock import steady
from megatron_vita.media.video import decode_frames, frame_starts, frame_times, probe_video
from tests.media.video_files import clip

KINDS = [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video")]
WRAP = 2**33 // 3600
"""Frames at 25 a second until the 33 bits of a time stamp at 90 kHz are full."""


def part(kind: tuple[str, str], brightness: int, *, start: int = 0, frames: int = 50) -> bytes:
    """A film of one brightness whose time stamps begin with frame number `start`."""

    def paint(picture: np.ndarray, index: int) -> None:
        picture[:] = brightness

    return clip(*kind, frames=frames, paint=paint, stamps=lambda index: index + start)


def sampled(data: bytes, fps: float = 4.0) -> list[int]:
    """The brightness of frames at equal distances, in steps of 10."""
    times = frame_times(probe_video(data, "clip"), max_fps=fps, max_frames=999)
    tiles = decode_frames(data, "clip", times=times, tile_size=16)
    alone = [decode_frames(data, "clip", times=[time], tile_size=16)[0] for time in times]
    assert (tiles == np.stack(alone)).all()
    return [round(int(tile[0, 8, 8]) / 10) * 10 for tile in tiles]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts", [(0, 0), (25000, 0), (0, 25000), (WRAP - 9999, 0), (1, 0, 0)])
def test_parts_that_were_joined_are_shown_one_after_another(
    kind: tuple[str, str], starts: tuple[int, ...]
) -> None:
    levels = [20, 200, 100][: len(starts)]
    data = b"".join(
        part(kind, level, start=start) for level, start in zip(levels, starts, strict=True)
    )
    info = probe_video(data, "clip")
    assert info.frames == 50 * len(starts)
    assert info.duration == pytest.approx(2 * len(starts), abs=0.15)
    assert sampled(data) == [level for level in levels for _ in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_film_goes_on_where_its_time_stamps_wrap_around(kind: tuple[str, str]) -> None:
    data = clip(*kind, frames=50, stamps=lambda index: WRAP - 25 + index)
    info = probe_video(data, "clip")
    assert (info.frames, info.duration) == (50, pytest.approx(2.0, abs=1e-3))
    shown = np.array(sampled(data, fps=5.0))
    assert abs(shown - (np.arange(10) * 20 + 10)).max() <= 10


def test_a_film_that_is_cut_off_and_begun_anew_goes_on() -> None:
    first = part(KINDS[0], 20)
    cut = first[: len(first) // 2 // 188 * 188]
    frames = probe_video(cut, "cut").frames
    info = probe_video(cut + part(KINDS[0], 200), "clip")
    assert info.duration == pytest.approx((frames + 50) / 25, abs=0.2)


def test_a_gap_of_less_than_ten_seconds_stays() -> None:
    data = part(KINDS[0], 20) + part(KINDS[0], 200, start=50 + 100)
    assert probe_video(data, "clip").duration == pytest.approx(8.0, abs=0.1)
    tiles = decode_frames(data, "clip", times=[1.9, 4.0, 5.9, 6.1], tile_size=16)
    assert [int(tile[0, 8, 8]) > 100 for tile in tiles] == [False, False, False, True]


def test_containers_whose_stamps_do_not_jump_keep_them() -> None:
    stamps = [*range(10), *range(1000, 1010)]
    data = clip("matroska", frames=20, stamps=stamps.__getitem__)
    starts = frame_starts(data, "clip")
    assert starts == pytest.approx([stamp / 25 for stamp in stamps], abs=1e-3)


def moved(*stamps: tuple[int | None, int | None]) -> list[tuple[int | None, int | None]]:
    """Decoding and presentation stamps, in hundredths of a second, of packets that last 4 each."""
    packets: list[Any] = [SimpleNamespace(dts=dts, pts=pts, duration=4) for dts, pts in stamps]
    out = list(steady(iter(packets), unit=0.01, frame_seconds=0.04))
    return [(packet.dts, packet.pts) for packet in out]


BEFORE = [(stamp, stamp) for stamp in range(0, 100, 4)]
"""Packets after which the next is decoded at 100."""


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        # A tenth of a second before the last packet, and ten seconds ahead, are within bounds.
        ([(86, 90)], [(86, 90)]),
        ([(1100, 1100)], [(1100, 1100)]),
        # Beyond, the packet follows the one before; later stamps are moved alike.
        ([(85, 93), (89, 97)], [(100, 108), (104, 112)]),
        ([(1101, 1101), (1105, 1109)], [(100, 100), (104, 108)]),
        # Packets without a stamp go on, and one damaged stamp moves nothing.
        ([(None, 100), (0, 0)], [(None, 100), (104, 104)]),
        ([(99999, 99999), (104, 104)], [(100, 100), (104, 104)]),
        # A presentation stamp from beyond a jump is no delay.
        ([(100, 104), (104, 9000), (9000, 9004)], [(100, 104), (104, 108), (108, 112)]),
    ],
)
def test_the_rule_is_that_of_ffmpeg(stamps: list, expected: list) -> None:
    assert moved(*BEFORE, *stamps)[len(BEFORE) :] == expected


def test_frames_that_are_always_far_apart_keep_their_times() -> None:
    slides = [(3000 * index, 3000 * index) for index in range(20)]
    assert moved(*slides) == slides
