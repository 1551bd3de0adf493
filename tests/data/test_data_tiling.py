"""Tilings and archives of frames from the recipe to tiles: counts from metadata alone, tiles into
given arrays."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vita.config import MediaConfig
from megatron_vita.data.planning.stamp import plan_stamp
from megatron_vita.data.planning.token_counts import document_lengths
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.data.samples.tiles import decode_tiles
from megatron_vita.data.shards.index_build import build_index
from megatron_vita.data.shards.tar import SampleWriter, ShardMedia
from megatron_vita.media.frame_archive import pack_frames
from megatron_vita.media.images import image_size
from megatron_vita.media.video import probe_video
from megatron_vita.text.chat_format import ChatFormat
from tests.data.toy_data import World, clip, picture, talk


@pytest.fixture
def encoder(world: World) -> SampleEncoder:
    recipe = world.recipe
    return SampleEncoder(
        chat=ChatFormat(world.tokenizer), media=recipe.media, vision=recipe.model.vision
    )


def with_media(encoder: SampleEncoder, **fields: Any) -> SampleEncoder:
    return replace(encoder, media=MediaConfig(**fields))


def test_the_recipe_says_how_images_are_cut(encoder: SampleEncoder) -> None:
    size = (180, 100)
    dynamic, anyres = (
        with_media(encoder, max_tiles=4, tiling=tiling) for tiling in ("dynamic", "anyres")
    )
    assert (dynamic.image("a", size).grid, anyres.image("a", size).grid) == ((2, 1), (2, 2))


def test_only_listed_grids_are_chosen(encoder: SampleEncoder) -> None:
    for tiling in ("dynamic", "anyres"):
        listed = with_media(encoder, tiling=tiling, grids=["2x1", "1x2", "2x2", "1x3", "3x1"])
        grids = {
            listed.image("a", size).grid
            for size in [(9, 9), (900, 900), (100, 900), (900, 100), (400, 200)]
        }
        assert grids <= {(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)}
        assert len(grids) > 2


@pytest.mark.parametrize("tiling", ["dynamic", "anyres"])
def test_tiles_of_an_image_are_those_that_its_size_told(
    encoder: SampleEncoder, tiling: str
) -> None:
    encoder = with_media(encoder, max_tiles=6, tiling=tiling)
    for size in ((200, 100), (30, 90), (28, 28), (500, 20)):
        data = picture(size, "red", format="JPEG")
        medium = encoder.image("a.jpg", image_size(data, "a.jpg"))
        assert encoder.measure_image(size)[1] == medium.num_tiles
        tiles = decode_tiles(
            medium,
            data,
            name="a.jpg",
            tiles=range(medium.num_tiles),
            tile_format=encoder.tile_format,
        )
        assert tiles.shape == (medium.num_tiles, 3, 28, 28)
        black = (tiles < 5).all(axis=1).any()
        assert black == (tiling == "anyres" and size in [(200, 100), (500, 20)])


def test_tiles_of_any_medium_are_written_into_a_given_array(encoder: SampleEncoder) -> None:
    data = {"a.jpg": picture((200, 100), "blue", format="JPEG"), "b.mp4": clip()}
    media = [
        encoder.image("a.jpg", (200, 100)),
        encoder.video("b.mp4", probe_video(data["b.mp4"], "b.mp4")),
    ]
    for medium in media:
        content = data[medium.member]
        name = medium.member
        whole = decode_tiles(
            medium,
            content,
            name=name,
            tiles=range(medium.num_tiles),
            tile_format=encoder.tile_format,
        )
        room = np.full((medium.num_tiles + 1, 3, 28, 28), 9, np.uint8)
        out = decode_tiles(
            medium,
            content,
            name=name,
            tiles=range(1, 3),
            tile_format=encoder.tile_format,
            out=room[1:3],
        )
        assert np.shares_memory(out, room)
        assert (room[1:3] == whole[1:3]).all()
        assert (room[[0, *range(3, len(room))]] == 9).all()


def test_an_archive_of_frames_is_a_video_of_a_shard(encoder: SampleEncoder, tmp_path: Path) -> None:
    frames = []
    for number in range(12):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (20 * number,) * 3).save(file, "PNG")
        frames.append((f"{number}.png", file.getvalue()))
    data = pack_frames(frames, fps=2)
    shard = tmp_path / "frames-000000.tar"
    with SampleWriter(shard) as writer:
        media = {"video": [ShardMedia(".frames.zip", data)]}
        writer.write("s0", record=talk("<video>What is it?", "Grey."), media=media)
    index = build_index(shard, encoder.chat)
    row = index.row(0)
    assert "s0.video0.frames.zip" in row.members
    assert document_lengths(index, encoder=encoder).tiles.tolist() == [6]
    medium = encoder.video("s0.video0.frames.zip", row.videos[0])
    tiles = decode_tiles(
        medium, data, name="frames", tiles=range(2, 5), tile_format=encoder.tile_format
    )
    assert tiles[:, 0, 14, 14].tolist() == [20 * number for number in (5, 7, 9)]


def test_a_plan_is_bound_to_the_tiling(world: World) -> None:
    stamps = []
    for fields in ({}, {"tiling": "anyres"}, {"grids": ["1x1", "2x2"]}):
        recipe = replace(world.recipe, media=MediaConfig(**fields))
        stamps.append(plan_stamp(recipe, "train", tokenizer=world.tokenizer, sources=[]))
    assert stamps[0] != stamps[1]
    assert stamps[0] != stamps[2]
    assert (stamps[1]["media.tiling"], stamps[2]["media.grids"]) == ("anyres", ["1x1", "2x2"])
