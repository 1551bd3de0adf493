"""Media encoded anew: the same pictures, smaller; what sampling finds in a re-cut video is what it
found before."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.reencode import Reencode
from megatron_vita.data.shards.reader import ShardReader
from megatron_vita.data.shards.tar import ShardMedia, scan_shard
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.frame_archive import pack_frames
from megatron_vita.media.video import decode_frames, frame_starts, frame_times, probe_video
from tests.data_tools.toy_jsonl import write_world
from tests.media.video_files import clip, damage


def film(*, frames: int = 250, rate: int = 25, rotation: int = 0) -> bytes:
    """A video with one key frame: frame i has brightness i / 250 on the left, the opposite on the
    right."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "1000", "crf": "10"})
        stream.width = 97 - 1
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            pixels = np.full((64, 96, 3), i % 250, np.uint8)
            pixels[:, 48:] = 250 - i % 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def sampled(data: bytes, fps: float) -> np.ndarray:
    times = frame_times(probe_video(data, "film"), max_fps=fps, max_frames=1000)
    return decode_frames(data, "film", times=times, tile_size=48).astype(int)


def key_frames(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        return [
            float(packet.pts * packet.time_base)
            for packet in container.demux(video=0)
            if packet.is_keyframe
        ]


@pytest.mark.parametrize("rotation", [0, 90])
def test_a_video_at_the_sampling_rate_shows_the_same_frames_from_many_key_frames(
    rotation: int,
) -> None:
    source = film(rotation=rotation)
    made = Reencode(video_fps=2.0, video_gop=1.0)("video", ShardMedia(".mkv", source))
    assert made.suffix == ".mp4"
    assert probe_video(made.data, "made").frames == 20
    assert probe_video(made.data, "made").duration == pytest.approx(10.0, abs=1e-3)
    assert np.abs(sampled(made.data, 2.0) - sampled(source, 2.0)).mean() < 3
    assert key_frames(made.data) == pytest.approx(list(range(10)))
    assert len(made.data) < len(source)


def test_a_lower_rate_than_the_re_cut_one_also_finds_the_source_s_frames() -> None:
    source = film()
    made = Reencode(video_fps=3.0)("video", ShardMedia(".mp4", source)).data
    assert np.abs(sampled(made, 1.0) - sampled(source, 1.0)).mean() < 3


def test_shorter_groups_alone_keep_every_frame() -> None:
    source = film(frames=60)
    made = Reencode(video_gop=0.4)("video", ShardMedia(".mp4", source)).data
    assert probe_video(made, "made").frames == 60
    assert np.abs(sampled(made, 25.0) - sampled(source, 25.0)).mean() < 3
    assert key_frames(made) == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6, 2.0])


def test_the_same_video_gives_the_same_bytes() -> None:
    source = film(frames=50)
    recut = Reencode(video_fps=1.0)
    assert recut("video", ShardMedia(".mp4", source)) == recut("video", ShardMedia(".mp4", source))


def test_images_become_jpeg_and_other_media_stay(tmp_path: Path) -> None:
    path = write_world(tmp_path, count=4)
    Image.effect_noise((200, 100), 50).convert("RGB").save(tmp_path / "media/0.png")
    out = str(tmp_path / "toy")
    assert (
        main(
            [
                "shard",
                str(path),
                "--media",
                str(tmp_path / "media"),
                "--out",
                out,
                "--jpeg-quality",
                "80",
            ]
        )
        == 0
    )
    shard = tmp_path / "toy/toy-000000.tar"
    member = next(scan_shard(shard)).members["toy-00000001.image0.jpg"]
    data = ShardReader().read(shard, member=member, shard_size=shard.stat().st_size)
    before = np.asarray(Image.open(tmp_path / "media/0.png")).astype(int)
    assert len(data) < (tmp_path / "media/0.png").stat().st_size
    assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - before).mean() < 12
    clip = ShardMedia(".mp4", b"film")
    assert Reencode(jpeg_quality=80)("video", clip) == clip
    assert Reencode(video_fps=1.0)("image", ShardMedia(".png", b"x")) == ShardMedia(".png", b"x")


def test_another_quality_is_another_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_world(tmp_path, count=4)
    arguments = [
        "shard",
        str(path),
        "--media",
        str(tmp_path / "media"),
        "--out",
        str(tmp_path / "toy"),
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--jpeg-quality", "80"]) == 1
    assert "another reencode" in capsys.readouterr().err


def test_what_cannot_be_encoded_is_named() -> None:
    with pytest.raises(DataError, match="the video"):
        Reencode(video_fps=1.0)("video", ShardMedia(".mp4", b"no film"))


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("jpeg_quality", 101, "--jpeg-quality"),
        ("video_gop", -1.0, "--video-gop"),
        ("video_fps", -1.0, "--video-fps"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        Reencode(**{field: value})


def joined() -> bytes:
    dark, bright = (
        clip("mpegts", frames=50, paint=lambda picture, _, level=level: picture.fill(level))
        for level in (20, 200)
    )
    return dark + bright


def mirrored() -> bytes:
    matrix = [-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30]
    return clip("mp4", frames=50, matrix=matrix, paint=lambda p, _: p[:, :32].fill(250))


UNUSUAL = {
    "stamps that jump": joined,
    "mirrored": mirrored,
    "times of decoding alone": lambda: clip("avi", frames=50),
    "no times": lambda: clip("h264", frames=50),
    "frames before the beginning": lambda: clip("mp4", frames=50, options={"bf": "3"}),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("changes", [{"video_fps": 5.0}, {"video_gop": 0.5}])
def test_an_unusual_video_shows_the_same_frames_at_the_same_times(
    kind: str, changes: dict[str, Any]
) -> None:
    source = UNUSUAL[kind]()
    made = Reencode(**changes)("video", ShardMedia(".ts", source)).data
    duration = probe_video(source, "source").duration
    assert probe_video(made, "made").duration == pytest.approx(duration, abs=1e-3)
    assert np.abs(sampled(made, 5.0) - sampled(source, 5.0)).mean() < 3


def test_frames_of_uneven_duration_keep_their_times_where_no_rate_is_asked_for() -> None:
    steps = np.random.default_rng(3).choice([1, 2, 3, 25, 40], 60)
    stamps = np.concatenate([[0], np.cumsum(steps)]).tolist()
    source = clip("matroska", frames=60, stamps=stamps.__getitem__)
    made = Reencode(video_gop=2.0)("video", ShardMedia(".mkv", source)).data
    assert frame_starts(made, "made") == pytest.approx(frame_starts(source, "source"), abs=1e-4)
    times = np.random.default_rng(4).uniform(0, stamps[-1] / 25, 40)
    shown = [
        decode_frames(data, "film", times=sorted(times), tile_size=16).astype(int)
        for data in (source, made)
    ]
    assert np.abs(shown[0] - shown[1]).mean() < 3


def test_an_archive_of_frames_is_kept_whatever_its_name() -> None:
    archive = ShardMedia(".zip", pack_frames([("0.png", b"picture")], 1.0))
    assert Reencode(video_fps=1.0)("video", archive) == archive


def test_a_video_with_damaged_frames_is_kept_and_named(caplog: pytest.LogCaptureFixture) -> None:
    source = ShardMedia(".mkv", damage(clip("matroska", "mjpeg"), range(20, 30)))
    assert Reencode(video_gop=1.0)("video", source, prefix="a.jsonl:7: ") == source
    reason = "a.jsonl:7: the video: 10 packets cannot be decoded, 10 of 60 frames that are shown"
    assert f"{reason}; it is kept as it is" in caplog.text
    assert Reencode(video_fps=1.0)("video", source).suffix == ".mp4"  # none of its frames is lost
