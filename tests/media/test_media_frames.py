"""Archives of frames: clips that are kept as folders of pictures."""

import io
import logging
import zipfile

import numpy as np
import pytest
from PIL import Image

from megatron_vita.errors import DataError
from megatron_vita.media import frame_archive
from megatron_vita.media.frame_archive import is_archive, pack_frames
from megatron_vita.media.video import VideoInfo, decode_frames, frame_times, probe_video
from tests.media.picture_files import exif_of, file_of

SIZE = 16


def pictures(count: int) -> list[tuple[str, bytes]]:
    """Frame i has brightness 4 * i; names are in no order."""
    frames = [Image.new("RGB", (40, 30), (4 * index,) * 3) for index in range(count)]
    return [
        (f"{(7 * index) % count:05d}.png", file_of(frame, "PNG"))
        for index, frame in enumerate(frames)
    ]


def numbers(data: bytes, times: list[float]) -> list[int]:
    tiles = decode_frames(data, "clip.frames.zip", times=times, tile_size=SIZE)
    assert tiles.shape == (len(times), 3, SIZE, SIZE)
    return [int(tile[0, SIZE // 2, SIZE // 2]) // 4 for tile in tiles]


def test_frames_come_in_the_order_in_which_they_were_packed_at_their_rate() -> None:
    data = pack_frames(pictures(40), 2)
    assert is_archive(data)
    info = probe_video(data, "clip")
    assert info == VideoInfo(duration=20.0, fps=2.0, frames=40)
    assert numbers(data, [0.0, 0.49, 0.5, 7.3, 19.9, 99.0]) == [0, 0, 1, 14, 39, 39]
    assert numbers(data, [-1.0]) == [0]


def test_the_size_of_a_clip_is_that_of_its_largest_frame_by_the_headers() -> None:
    sizes = [(8, 8), (90, 70), (100, 60)]
    frames = [
        (f"{width}.png", file_of(Image.new("L", (width, height)), "PNG")) for width, height in sizes
    ]
    assert probe_video(pack_frames([*frames, ("text.png", b"text")], 1.0), "clip").size == (90, 70)
    assert probe_video(pack_frames([("text.png", b"text")], 1.0), "clip").size == (0, 0)


def test_samples_are_uniform_over_the_whole_clip() -> None:
    data = pack_frames(pictures(50), 1.0)
    times = frame_times(probe_video(data, "clip"), max_fps=1, max_frames=5)
    assert numbers(data, times) == [5, 15, 25, 35, 45]
    every = frame_times(probe_video(data, "clip"), max_fps=1, max_frames=999)
    assert numbers(data, every) == list(range(50))


def test_an_archive_made_by_other_programs_is_read_at_one_frame_a_second() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("frames/", b"")
        for name, content in pictures(3):
            archive.writestr(f"frames/{name}", content)
    assert probe_video(file.getvalue(), "clip") == VideoInfo(duration=3.0, fps=1.0, frames=3)
    assert numbers(file.getvalue(), [0.5, 2.5]) == [0, 2]


HIDDEN = [
    "._00001.png",
    "frames/._00001.png",
    "__MACOSX/frames/._00001.png",
    ".DS_Store",
    ".thumbnails/00001.png",
    "Thumbs.db",
    "frames/desktop.ini",
    "@eaDir/00001.png/SYNOPHOTO_THUMB_M.jpg",
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_files_in_an_archive_are_no_frames(hidden: str) -> None:
    frames = pictures(3)
    data = pack_frames([frames[0], (hidden, b"\0\5\x16\7"), *frames[1:]], 1)
    assert probe_video(data, "clip") == VideoInfo(duration=3.0, fps=1.0, frames=3)
    assert numbers(data, [0.5, 1.5, 2.5]) == [0, 1, 2]
    with pytest.raises(DataError, match=r"clip: this archive of frames holds none"):
        probe_video(pack_frames([(hidden, frames[0][1])], 1), "clip")


def test_a_rate_that_a_folder_brought_into_an_archive_is_refused_by_name() -> None:
    data = pack_frames([*pictures(2), ("frames/fps.txt", b"25")], 1)
    with pytest.raises(DataError, match=r"clip: frames/fps.txt is not a frame; .* comment"):
        probe_video(data, "clip")


def test_the_same_frames_give_the_same_bytes() -> None:
    assert pack_frames(pictures(3), 1.5) == pack_frames(iter(pictures(3)), 1.5)


def test_frames_are_turned_upright_and_letterboxed() -> None:
    wide = Image.new("RGB", (40, 20), "white")
    (tile,) = decode_frames(
        pack_frames([("a.jpg", file_of(wide, "JPEG", exif=exif_of(6)))], 1),
        "clip",
        times=[0.0],
        tile_size=SIZE,
    )
    assert (tile[:, :, 4:12] > 250).all()
    assert (tile[:, :, :4] == np.array([123, 116, 103])[:, None, None]).all()


def test_a_damaged_frame_is_replaced_by_the_one_before_or_at_the_start_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    frames = pictures(10)
    for lost in (0, 1, 4, 5):
        frames[lost] = (frames[lost][0], b"not an image")
    data = pack_frames(frames, 1)
    with caplog.at_level(logging.WARNING):
        assert numbers(data, [0.0, 1.0, 3.0, 4.0, 5.0, 6.0]) == [2, 2, 3, 3, 3, 6]
    assert f"clip.frames.zip {frames[4][0]}" in caplog.text
    assert numbers(data, [5.0]) == [3]


def test_frames_that_stand_for_damaged_ones_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    frames = pictures(10)
    for lost in (0, 4, 5):
        frames[lost] = (frames[lost][0], b"not an image")
    told: list[tuple[int, str]] = []
    times = [0.0, 1.0, 3.0, 4.0, 4.5, 5.0, 6.0]
    data = pack_frames(frames, 1)
    decode_frames(data, "clip", times=times, tile_size=SIZE, report=lambda *of: told.append(of))
    assert told == [(4, "clip: 4 of 7 frames cannot be read")]


def test_a_frame_that_is_shown_several_times_is_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = frame_archive.read_pixels
    names: list[str] = []
    monkeypatch.setattr(
        frame_archive, "read_pixels", lambda data, name: names.append(name) or read(data, name)
    )
    assert numbers(pack_frames(pictures(5), 1), [1.0, 1.2, 1.7, 3.0, 3.1]) == [1, 1, 1, 3, 3]
    assert len(names) == 2


def test_changed_bytes_are_noticed() -> None:
    data = bytearray(pack_frames(pictures(3), 1))
    place = data.index(pictures(3)[1][1]) + 40
    data[place] ^= 1
    assert numbers(bytes(data), [1.0]) == [0]


def test_archives_that_do_not_keep_the_format_are_refused_by_name() -> None:
    deflated = io.BytesIO()
    empty = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"0" * 999)
    with zipfile.ZipFile(empty, "w"):
        pass
    whole = pack_frames(pictures(3), 1)
    no_rate = whole[: whole.rindex(b"PK\x05\x06")] + whole[whole.rindex(b"PK\x05\x06") :].replace(
        b"\x01\x001", b"\x01\x000"
    )
    cases = {
        deflated.getvalue(): r"a\.png is compressed; frames must be stored",
        empty.getvalue(): "holds none",
        whole[:-40]: "cannot read this archive of frames",
        no_rate: r"'0', is not a rate",
        pack_frames([("a", b"x"), ("b", b"y")], 1): "none of the 2 frames",
    }
    for data, message in cases.items():
        with pytest.raises(DataError, match=rf"odd\.zip.*{message}|{message}.*odd\.zip"):
            decode_frames(data, "odd.zip", times=[0.0], tile_size=SIZE)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_no_archive_is_made_without_a_rate_or_without_frames(rate: float) -> None:
    with pytest.raises(DataError, match="positive number of frames in a second"):
        pack_frames(pictures(1), rate)
    with pytest.raises(DataError, match="no frames"):
        pack_frames([], 1.0)


def test_damaged_archives_raise_nothing_but_data_errors() -> None:
    data = pack_frames(pictures(4), 2)
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 4):
            damaged[place] = generator.integers(0, 256)
        try:
            probe_video(bytes(damaged), "clip")
            decode_frames(bytes(damaged), "clip", times=[0.0, 1.0], tile_size=8)
        except DataError as error:
            assert "clip" in str(error)  # noqa: PT017
