"""Tiles are decoded in runs: images whole, films in parts that several readers share."""

import numpy as np
import pytest

from megatron_vita.data.samples.encoding import Medium, TileFormat
from megatron_vita.errors import DataError
from megatron_vita.inference.requests.prompt import MediaFile
from megatron_vita.inference.requests.scheduler_output import NewSequence
from megatron_vita.inference.vision import tile_decoder
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.inference.vision.tile_decoder import TileDecoder
from megatron_vita.media.tiling import Grid, Tiling
from megatron_vita.supervise.shared_memory import SharedFile

FORM = TileFormat(Tiling(tile_size=2, grids=(Grid(4, 3),)), "imagenet")
IMAGE = Medium("image", 13, Grid(4, 3), [])


class Recorder(DecodePool):
    """Gives tiles that tell their number in the medium, and notes what is asked; a name `bad` is
    damaged."""

    def __init__(self) -> None:
        super().__init__(FORM, count=1, seconds=1)
        self.asked: list[tuple[str, range]] = []

    def decode(self, file: SharedFile, medium: Medium, *, name: str, tiles: range) -> np.ndarray:
        self.asked.append((name, tiles))
        if name == "bad":
            raise DataError("bad: damaged")
        return np.array([np.full((3, 2, 2), tile % 256, dtype=np.uint8) for tile in tiles])


def film(frames: int) -> Medium:
    return Medium("film", frames, None, [float(frame) for frame in range(frames)])


def decoder(readers: DecodePool, *media: tuple[str, Medium]) -> TileDecoder:
    """A tile decoder with sequence 5, which owns the media."""
    decoder = TileDecoder(readers)
    empty = np.zeros(0, dtype=np.int64)
    files = [MediaFile(name=name, data=b"") for name, _ in media]
    shown = [medium for _, medium in media]
    decoder.add(
        NewSequence(sequence=5, input_ids=empty, placements=empty, media=shown, files=files)
    )
    return decoder


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(tile_decoder, "DECODERS", 4)
    return Recorder()


def test_an_image_is_decoded_once_and_a_film_by_several(readers: Recorder) -> None:
    source = decoder(readers, ("a", IMAGE), ("b", film(60)), ("c", IMAGE))
    source.begin(5, range(86))
    pixels, failed = source.take([(5, tile) for tile in range(86)])
    assert pixels[:, 0, 0, 0].tolist() == [*range(13), *range(60), *range(13)]
    assert failed == {}
    frames = [range(0, 22), range(22, 44), range(44, 60)]
    assert sorted(readers.asked, key=str) == [
        ("a", range(13)),
        *[("b", part) for part in sorted(frames, key=str)],
        ("c", range(13)),
    ]


@pytest.mark.parametrize(
    ("frames", "sizes"), [(5, [5]), (20, [8, 8, 4]), (64, [16] * 4), (300, [64] * 4 + [44])]
)
def test_parts_of_a_film_are_neither_too_short_nor_too_long(
    readers: Recorder, frames: int, sizes: list[int]
) -> None:
    source = decoder(readers, ("b", film(frames)))
    source.begin(5, range(frames))
    source.take([(5, tile) for tile in range(frames)])
    assert sorted((len(part) for _, part in readers.asked), reverse=True) == sorted(
        sizes, reverse=True
    )


def test_a_damaged_medium_is_black_and_named_and_others_are_there(readers: Recorder) -> None:
    source = decoder(readers, ("bad", IMAGE), ("a", IMAGE))
    source.begin(5, range(1, 26))
    assert source.ready([5], timeout=10) == [5]
    pixels, failed = source.take([(5, 1), (5, 14)])
    assert pixels[:, 0, 0, 0].tolist() == [0, 1]
    assert failed == {5: "bad: damaged"}
