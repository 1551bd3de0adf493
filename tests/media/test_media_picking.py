"""Videos read in parts: the same frames as by decoding everything, from far fewer."""

import functools
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest

from megatron_vita.media import video as video_module
from megatron_vita.media.clip import Clip, Coded
from megatron_vita.media.images import Pixels
from megatron_vita.media.normalization import mean_color
from megatron_vita.media.picking import Picker
from megatron_vita.media.resize import letterboxed
from megatron_vita.media.video import decode_frames, frame_times, probe_video
from tests.media.video_files import clip

SIZE = 28
FAST = {"deadline": "realtime", "cpu-used": "8"}
NO_SCENE_CUTS = {"sc_threshold": "0"}  # key frames are where they are expected
FORMATS = [
    ("mp4", "libx264", {}),
    ("mp4", "libx264", {"bf": "0"}),
    ("mp4", "libx264", {"x264-params": "open-gop=1:b-pyramid=normal"}),
    ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ("mp4", "libx265", {"x265-params": "log-level=none"}),
    ("mp4", "libsvtav1", {"preset": "12"}),
    ("matroska", "libx264", {}),
    ("matroska", "mpeg4", {"bf": "2"}),
    ("mpegts", "libx264", {}),
    ("mpegts", "mpeg2video", {"bf": "2"}),
    ("flv", "libx264", {}),
    ("webm", "libvpx", {**FAST, "auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("webm", "libvpx-vp9", FAST),
]


@functools.cache
def texture(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 200, shape, dtype=np.uint8)


def scene(picture: np.ndarray, index: int) -> None:
    """A texture that drifts, and a bright patch that jumps."""
    noise = texture(picture.shape)
    picture[:] = np.roll(noise, (index, 2 * index), axis=(0, 1))
    place = 7 * index % 40
    picture[place : place + 16, place : place + 16] = 250


def film(
    file_format: str = "mp4",
    codec: str = "libx264",
    *,
    gop: int = 24,
    frames: int = 90,
    **options: Any,
) -> bytes:
    return clip(file_format, codec, frames=frames, gop=gop, paint=scene, **options)


@functools.lru_cache(maxsize=2)
def every_frame(data: bytes) -> list[tuple[float, np.ndarray]]:
    """Time, from the first frame on, and pixels of all frames of a video, decoded from its
    beginning to its end."""
    with av.open(io.BytesIO(data)) as container:
        frames = [
            (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    return [(float(time - frames[0][0]), pixels) for time, pixels in frames]


def tile_of(pixels: np.ndarray) -> np.ndarray:
    return letterboxed(Pixels(pixels, 1), (SIZE, SIZE), mean_color("imagenet"))


def shown_at(data: bytes, times: list[float]) -> list[np.ndarray]:
    frames = every_frame(data)
    return [
        tile_of(max((f for f in frames if f[0] <= time + 5e-4), key=lambda f: f[0])[1])
        for time in times
    ]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times of all frames that come out of the decoder."""
    times: list[float] = []
    time_of = Clip.time_of

    def noting(self: Clip, frame: av.VideoFrame) -> float | None:
        times.append(time_of(self, frame) or -1.0)
        return time_of(self, frame)

    monkeypatch.setattr(Clip, "time_of", noting)
    return times


@pytest.mark.parametrize(("file_format", "codec", "options"), FORMATS)
def test_frames_are_those_of_decoding_everything(
    file_format: str, codec: str, options: dict
) -> None:
    data = film(file_format, codec, options=options)
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 17):
        times = sorted(generator.uniform(0, 3.6, count).tolist())
        found = decode_frames(data, "clip", times=times, tile_size=SIZE)
        assert (found == np.stack(shown_at(data, times))).all()


def test_frames_that_nothing_needs_are_not_decoded(decoded: list[float]) -> None:
    data = film(frames=250, gop=250)
    times = [1.3, 5.1, 9.4]
    expected = shown_at(data, times)
    found = decode_frames(data, "clip", times=times, tile_size=SIZE)
    assert (found == np.stack(expected)).all()
    assert len(decoded) < 0.7 * 9.4 * 25
    decoded.clear()
    decode_frames(film(frames=250, gop=10), "clip", times=times, tile_size=SIZE)
    assert len(decoded) < 3 * 14


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are opened, once for each pass over them."""
    names: list[str] = []
    open_clip = video_module.open_clip
    monkeypatch.setattr(
        video_module, "open_clip", lambda data, name: names.append(name) or open_clip(data, name)
    )
    return names


def test_only_the_first_pass_is_made_for_a_faultless_video(opened: list[str]) -> None:
    # it holds frames that are never shown
    made = [entry for entry in FORMATS if entry[1] != "libvpx"]
    for file_format, codec, options in made:
        data = film(file_format, codec, options=options)
        decode_frames(data, codec, times=[index / 7 for index in range(24)], tile_size=SIZE)
    assert opened == [codec for _, codec, _ in made]


@pytest.mark.parametrize("file_format", ["mp4", "matroska"])
def test_the_moment_before_a_key_frame_is_found_in_one_pass(
    file_format: str, opened: list[str]
) -> None:
    data = film(file_format, frames=1300, options=NO_SCENE_CUTS)
    for frame in (1199, 1200, 1201):  # 1200 is a key frame
        tiles = decode_frames(data, "clip", times=[frame / 25], tile_size=SIZE)
        assert (tiles == np.stack(shown_at(data, [frame / 25]))).all()
    assert len(opened) == 3


class HastyClip:
    """A clip whose decoder gives each frame as soon as all that are shown earlier have come."""

    origin = 0.0
    counts = False

    def __init__(self, order: list[int]) -> None:
        self._packets: Iterator[Any] = iter(
            [
                Coded(cast(Any, SimpleNamespace(is_keyframe=n == 0, n=n)), float(n), True)
                for n in order
            ]
        )
        self._held: set[int] = set()
        self._shown = 0
        self.codec = SimpleNamespace(
            decode=self._decode, flush_buffers=lambda: None, skip_frame="DEFAULT"
        )

    def read(self) -> Coded | None:
        return next(self._packets, None)

    def time_of(self, frame: int) -> float:
        return float(frame)

    def _decode(self, packet: SimpleNamespace | None) -> list[int]:
        self._held |= {packet.n} if packet else set()
        out = []
        while self._shown in self._held:
            out.append(self._shown)
            self._shown += 1
        return out


@pytest.mark.parametrize("jump", [True, False])
def test_a_frame_is_not_taken_before_all_that_may_be_shown_next_are_known(jump: bool) -> None:
    order = [0, 8, 4, 2, 1, 3, 6, 5, 7, 16, 12, 10, 9, 11, 14, 13, 15]
    moments = [1.5, 2.0, 5.9, 7.2, 9.0, 17.0]
    taken: list[Any] = []
    picker = Picker(
        cast(Any, HastyClip(order)),
        moments,
        lambda _, frame: taken.append(frame),
        jump=jump,
        skip=jump,
    )
    picked = picker.run()
    assert taken == [1, 2, 5, 7, 9, 16]
    assert [pick.time for pick in picked] == taken
    assert all(pick.is_exact and pick.is_covered for pick in picked)


@pytest.mark.parametrize("file_format", ["mp4", "matroska"])
def test_frames_of_uneven_duration_are_found_by_their_time_stamps(file_format: str) -> None:
    steps = np.random.default_rng(3).choice([1, 2, 3, 25, 40], 80)
    stamps = np.concatenate([[0], np.cumsum(steps)]).tolist()
    data = film(file_format, frames=80, stamps=stamps.__getitem__)
    info = probe_video(data, "clip")
    assert info.frames == 80
    assert info.duration == pytest.approx(stamps[79] / 25, abs=2)
    times = frame_times(info, max_fps=1, max_frames=99)
    frames = every_frame(data)
    assert np.allclose([time for time, _ in frames], np.array(stamps[:80]) / 25, atol=1e-3)
    found = decode_frames(data, "clip", times=times, tile_size=SIZE)
    for time, tile in zip(times, found, strict=True):
        shown = max(index for index in range(80) if stamps[index] / 25 <= time + 5e-4)
        assert (tile == tile_of(frames[shown][1])).all()


@pytest.mark.parametrize("file_format", ["mp4", "matroska", "mpegts"])
def test_a_video_of_twelve_hours_is_read_at_its_key_frames(
    file_format: str, decoded: list[float]
) -> None:
    # a frame every 30 seconds
    data = film(file_format, frames=1440, stamps=lambda index: 750 * index, gop=12)
    info = probe_video(data, "long")
    assert info.duration == pytest.approx(12 * 3600, rel=0.01)
    times = frame_times(info, max_fps=1, max_frames=16)
    frames = every_frame(data)
    decoded.clear()
    found = decode_frames(data, "long", times=times, tile_size=SIZE)
    assert len(decoded) < 16 * 17
    for time, tile in zip(times, found, strict=True):
        assert (tile == tile_of(frames[int((time + 5e-4) // 30)][1])).all()


@pytest.fixture
def packets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All packets that are read."""
    read = Clip.read
    packets: list[object] = []
    monkeypatch.setattr(Clip, "read", lambda self: packets.append(read(self)) or packets[-1])
    return packets


@pytest.mark.parametrize(
    ("file_format", "few"), [("mp4", True), ("matroska", True), ("mpegts", False)]
)
def test_where_an_index_allows_it_a_reader_of_the_end_does_not_read_the_beginning(
    file_format: str, few: bool, packets: list[object]
) -> None:
    data = film(file_format, frames=1500)
    found = decode_frames(data, "clip", times=[58.0, 59.0], tile_size=SIZE)
    assert (len(packets) < 150) == few
    assert (found == np.stack(shown_at(data, [58.0, 59.0]))).all()


def test_nothing_is_read_twice_where_key_frames_are_far_apart(packets: list[object]) -> None:
    data = film(frames=1500, gop=1500, options=NO_SCENE_CUTS)
    decode_frames(data, "clip", times=[5.0, 30.0, 58.0], tile_size=SIZE)
    assert len(packets) <= 1501


def test_readers_of_parts_give_what_one_reader_gives() -> None:
    for file_format in ("mp4", "matroska", "mpegts"):
        data = film(file_format, frames=1500, gop=100)
        times = frame_times(probe_video(data, "clip"), max_fps=1, max_frames=99)
        whole = decode_frames(data, "clip", times=times, tile_size=SIZE)
        for start in range(0, 60, 13):
            part = decode_frames(data, "clip", times=times[start : start + 13], tile_size=SIZE)
            assert (part == whole[start : start + 13]).all()


def test_a_file_cut_off_before_its_index_is_read_without(decoded: list[float]) -> None:
    data = film("matroska", frames=1500)
    half = data[: len(data) // 2]
    info = probe_video(half, "half")
    assert 20 < info.duration < 40
    times = [info.duration - 0.5]
    assert (
        decode_frames(half, "half", times=times, tile_size=SIZE) == np.stack(shown_at(half, times))
    ).all()


def test_a_video_of_one_frame_is_shown_at_any_time() -> None:
    for file_format in ("mp4", "matroska", "mpegts", "avi"):
        data = film(file_format, frames=1)
        info = probe_video(data, "one")
        times = frame_times(info, max_fps=1, max_frames=9)
        assert len(times) == info.frames == 1
        tiles = decode_frames(data, "one", times=[*times, 99.0], tile_size=SIZE)
        assert (tiles == shown_at(data, [0.0])[0]).all()


def test_flipped_bytes_cost_the_frames_they_hit_and_no_reader_sees_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = bytearray(film("mpegts", frames=250, gop=25))
    generator = np.random.default_rng(1)
    for place in generator.integers(len(data) // 3, len(data) // 2, 6):
        data[place] ^= 0xFF
    times = frame_times(probe_video(bytes(data), "clip"), max_fps=5, max_frames=99)
    found = decode_frames(bytes(data), "clip", times=times, tile_size=SIZE)
    clean = np.stack(shown_at(film("mpegts", frames=250, gop=25), times))
    same = (found == clean).all(axis=(1, 2, 3))
    assert 0.5 < same.mean() < 1


def test_tiles_are_written_into_a_given_array() -> None:
    room = np.full((5, 3, SIZE, SIZE), 77, np.uint8)
    data = film()
    out = decode_frames(data, "clip", times=[0.5, 1.5], tile_size=SIZE, out=room[1:3])
    assert np.shares_memory(out, room)
    assert (room[1:3] == decode_frames(data, "clip", times=[0.5, 1.5], tile_size=SIZE)).all()
    assert (room[[0, 3, 4]] == 77).all()
