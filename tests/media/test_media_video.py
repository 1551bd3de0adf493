"""Videos: which moments are looked at, and that the frame of each is the right one."""

import io
import logging

import av
import numpy as np
import pytest
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media import clip as clip_module
from megatron_vita.media.normalization import mean_color
from megatron_vita.media.video import VideoInfo, decode_frames, frame_times, num_frames, probe_video
from tests.media.video_files import clip, damage

SIZE = 16
FORMATS = [
    ("mp4", "libx264", {}),
    ("mp4", "libx264", {"x264-params": "open-gop=1"}),
    ("mp4", "libx264", {"x264-params": "intra-refresh=1"}),
    ("matroska", "libx264", {}),
    ("mpegts", "libx264", {}),
    ("avi", "libx264", {}),
    ("h264", "libx264", {}),
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    ("avi", "mpeg4", {"qscale": "1"}),
    ("avi", "mjpeg", {}),
]


def numbers(data: bytes, times: list[float]) -> list[int]:
    """The frame numbers that brightness tells."""
    frames = decode_frames(data, "clip", times=times, tile_size=SIZE)
    assert frames.shape == (len(times), 3, SIZE, SIZE)
    assert frames.dtype == np.uint8
    return [round(float(frame[:, 4:-4, 4:-4].mean()) / 4) for frame in frames]


@pytest.mark.parametrize(("file_format", "codec", "options"), FORMATS)
def test_every_frame_is_found_at_its_time_in_every_kind_of_file(
    file_format: str, codec: str, options: dict
) -> None:
    data = clip(file_format, codec, options=options)
    info = probe_video(data, "clip")
    assert (info.duration, info.fps, info.frames) == (pytest.approx(2.4), pytest.approx(25), 60)
    assert info.size == (64, 64)
    times = [index / 25 for index in range(60)]
    slack = 1 if codec == "mpeg4" else 0  # coarse brightness
    assert np.abs(np.subtract(numbers(data, times), range(60))).max() <= slack
    alone = [numbers(data, [time])[0] for time in times[::7]]
    assert np.abs(np.subtract(alone, range(0, 60, 7))).max() <= slack
    assert (
        np.abs(np.subtract(numbers(data, [0.31, 0.33, 1.21, 2.39]), [7, 8, 30, 59])).max() <= slack
    )


def test_any_part_of_the_times_gives_the_same_pixels_as_all() -> None:
    data = clip()
    times = frame_times(probe_video(data, "clip"), max_fps=5, max_frames=100)
    whole = decode_frames(data, "clip", times=times, tile_size=SIZE)
    for start, stop in [(0, 5), (5, 6), (4, 12), (11, 12)]:
        assert (
            decode_frames(data, "clip", times=times[start:stop], tile_size=SIZE)
            == whole[start:stop]
        ).all()


def test_frames_of_uneven_duration_are_found_by_time() -> None:
    data = clip(
        "matroska", stamps=lambda index: index if index < 20 else 20 + 5 * (index - 20), frames=40
    )
    assert probe_video(data, "clip").frames == 40
    assert numbers(data, [0.5, 0.99, 1.21, 2.0]) == [12, 20, 22, 26]


def test_times_outside_the_video_give_its_first_and_last_frame() -> None:
    assert numbers(clip(), [-1.0, 99.0]) == [0, 59]


def test_no_times_give_no_frames() -> None:
    assert decode_frames(b"", "clip", times=[], tile_size=SIZE).shape == (0, 3, SIZE, SIZE)


def test_samples_are_the_middles_of_equal_parts_of_the_whole_video() -> None:
    info = VideoInfo(duration=10.0, fps=25.0, frames=250)
    assert frame_times(info, max_fps=1, max_frames=128) == pytest.approx(
        [index + 0.5 for index in range(10)]
    )
    assert frame_times(info, max_fps=1, max_frames=4) == pytest.approx([1.25, 3.75, 6.25, 8.75])


@pytest.mark.parametrize(
    ("info", "max_fps", "max_frames", "expected"),
    [
        (VideoInfo(10.0, 25.0, 250), 1.0, 128, 10),
        (VideoInfo(10.9, 25.0, 272), 1.0, 128, 10),
        (VideoInfo(10.0, 25.0, 250), 0.5, 128, 5),
        (VideoInfo(10.0, 25.0, 250), 1.0, 3, 3),
        (VideoInfo(10.0, 25.0, 250), 100.0, 999, 250),
        (VideoInfo(0.3, 25.0, 8), 1.0, 128, 1),
        (VideoInfo(0.0, 0.0, 1), 1.0, 128, 1),
        # 0.1 * 3 is a little more than 0.3, 2.9999 as much
        (VideoInfo(0.1 * 3, 10.0, 3), 10.0, 128, 3),
    ],
)
def test_frames_keep_every_limit_and_are_at_least_one(
    info: VideoInfo, max_fps: float, max_frames: int, expected: int
) -> None:
    assert num_frames(info, max_fps=max_fps, max_frames=max_frames) == expected
    assert len(frame_times(info, max_fps=max_fps, max_frames=max_frames)) == expected


def test_squashed_frames_are_the_whole_frame_as_pillow_resizes_it() -> None:
    """As InternVL's processor shows them; rotated ones and ones of another shape, too."""
    for size in ((96, 40), (40, 96), (64, 64)):
        data = clip(size=size, frames=30)
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        tiles = decode_frames(data, "clip", times=[0.0, 0.8], tile_size=28, fit="squash")
        for tile, frame in zip(tiles, (frames[0], frames[20]), strict=True):
            expected = np.array(frame.resize((28, 28), Image.Resampling.BICUBIC))
            assert np.abs(tile.transpose(1, 2, 0).astype(int) - expected).max() <= 1


def test_frames_are_padded_to_a_square_with_the_mean_colour() -> None:
    data = clip(size=(64, 32), frames=1)
    for kind in ("imagenet", "siglip"):
        (frame,) = decode_frames(data, "clip", times=[0.0], tile_size=SIZE, normalization=kind)
        assert (frame[:, :2] == np.array(mean_color(kind))[:, None, None]).all()
        assert (frame[:, -2:] == np.array(mean_color(kind))[:, None, None]).all()
        assert frame[:, 6:10].max() <= 8


@pytest.mark.parametrize(("rotation", "side"), [(90, "left"), (180, "bottom"), (-90, "right")])
def test_a_rotated_recording_comes_out_upright(rotation: int, side: str) -> None:
    def white_top(picture: np.ndarray, index: int) -> None:
        picture[:32] = 255

    (frame,) = decode_frames(
        clip(paint=white_top, frames=1, rotation=rotation), "clip", times=[0.0], tile_size=SIZE
    )
    halves = {
        "left": frame[:, :, :7],
        "right": frame[:, :, 9:],
        "bottom": frame[:, 9:],
        "top": frame[:, :7],
    }
    assert max(halves, key=lambda name: halves[name].mean()) == side


def test_a_truncated_video_counts_and_repeats_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = clip(options={"movflags": "faststart"}, file_format="mpegts")
    half = data[: len(data) // 2]
    info = probe_video(half, "half")
    assert 10 < info.frames < 50
    assert info.duration == pytest.approx(info.frames / 25, abs=0.2)
    last = numbers(half, [info.duration, 2.4])
    assert last[0] == last[1]
    assert last[0] == pytest.approx(info.frames, abs=4)


def reported(data: bytes, times: list[float]) -> int:
    """Frames that are said to stand for damaged ones."""
    told: list[tuple[int, str]] = []
    decode_frames(data, "clip", times=times, tile_size=SIZE, report=lambda *of: told.append(of))
    assert all(reason.startswith("clip: ") for _, reason in told)
    return sum(frames for frames, _ in told)


def test_lost_packets_repeat_the_frame_before_and_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = damage(clip("matroska", "mjpeg"), range(20, 30))
    times = [0.7, 0.8, 1.0, 1.16, 1.2]
    with caplog.at_level(logging.WARNING):
        assert numbers(data, times) == [17, 19, 19, 19, 30]
    assert "clip: 10 packets cannot be decoded, 3 of 5 frames that are shown" in caplog.text
    assert reported(data, times) == 3
    assert reported(data, [0.7, 1.2]) == 0


def test_a_lost_beginning_is_filled_with_the_first_frame_there_is() -> None:
    data = damage(clip("matroska", "mjpeg"), range(0, 5))
    assert numbers(data, [0.0, 0.1, 0.2, 0.24]) == [5, 5, 5, 6]
    assert reported(data, [0.0, 0.1, 0.2, 0.24]) == 2


def test_a_lost_part_is_filled_from_the_part_before_even_when_asked_alone() -> None:
    data = damage(clip("matroska", "libvpx-vp9"), range(20, 30))
    assert numbers(data, [1.0]) == [19]
    assert numbers(data, [0.2, 1.0, 1.2]) == [5, 19, 30]
    assert reported(data, [0.2, 1.0, 1.2]) == 1


@pytest.mark.parametrize("which", [range(23, 26), range(20, 23)])
def test_frames_that_stand_for_others_are_counted_alike_in_parts_and_containers(
    which: range,
) -> None:
    times = [index / 25 for index in range(60)]
    whole = damage(clip("mp4"), which)
    count = reported(whole, times)
    assert 3 <= count <= 10
    assert reported(whole, times[:23]) + reported(whole, times[23:]) == count
    # frames are counted there, since AVI tells times of decoding alone
    assert reported(damage(clip("avi"), which), times) == count


def test_a_faultless_video_reports_nothing() -> None:
    hidden = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"}
    for data in (clip(), clip("avi"), clip("h264"), clip("webm", "libvpx", options=hidden)):
        assert reported(data, [index / 25 for index in range(60)]) == 0


def test_frames_that_are_counted_are_right_again_from_the_key_frame_behind_a_loss() -> None:
    data = damage(clip("avi"), range(20, 23))
    assert numbers(data, [index / 25 for index in range(60)])[30:] == list(range(30, 60))


def test_what_holds_no_video_is_refused_by_name() -> None:
    audio = io.BytesIO()
    with av.open(audio, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    for data in (b"", b"not a video at all", clip()[:200], audio.getvalue()):
        with pytest.raises(DataError, match=r"odd\.mp4"):
            probe_video(data, "odd.mp4")
        with pytest.raises(DataError, match=r"odd\.mp4"):
            decode_frames(data, "odd.mp4", times=[0.0], tile_size=SIZE)


def test_frames_of_too_many_pixels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(size=(64, 48))
    monkeypatch.setattr(clip_module, "MAX_FRAME_PIXELS", 64 * 48)
    assert numbers(data, [0.4]) == [10]
    monkeypatch.setattr(clip_module, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(DataError, match=r"clip: none of the 60 packets"):
        numbers(data, [0.4])


def test_a_stream_of_an_unknown_codec_is_refused_by_name() -> None:
    for data in (
        clip().replace(b"avc1", b"zzzz"),
        clip("matroska").replace(b"V_MPEG4/", b"V_ZZZZZ/"),
    ):
        with pytest.raises(
            DataError, match=r"odd\.mp4: no video stream that can be decoded among \['video'\]"
        ):
            decode_frames(data, "odd.mp4", times=[0.0], tile_size=SIZE)


def test_a_video_without_a_frame_that_can_be_decoded_is_refused_by_name() -> None:
    data = damage(clip("matroska", "mjpeg"), range(60))
    with pytest.raises(DataError, match=r"clip.mkv: none of the 60 packets"):
        decode_frames(data, "clip.mkv", times=[0.0, 1.0], tile_size=SIZE)


@pytest.mark.parametrize("file_format", ["mp4", "matroska", "mpegts"])
def test_damaged_bytes_raise_nothing_but_data_errors(file_format: str) -> None:
    data = clip(file_format, frames=20)
    generator = np.random.default_rng(0)
    messages = []
    for _ in range(25):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 8):
            damaged[place] = generator.integers(0, 256)
        try:
            info = probe_video(bytes(damaged), "clip")
            assert np.isfinite([info.duration, info.fps]).all()
            decode_frames(bytes(damaged), "clip", times=[0.0, 0.3, 0.7], tile_size=8)
        except DataError as error:
            messages.append(str(error))
    assert all(message.startswith("clip: ") for message in messages)


def test_a_file_that_names_another_place_to_read_from_is_refused_unopened() -> None:
    session = (
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    )
    # and not: timed out, after waiting at port 5004
    with pytest.raises(DataError, match="Invalid data"):
        probe_video(session + b"a=rtpmap:96 H264/90000\n", "session.sdp")
