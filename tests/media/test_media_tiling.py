"""Tiling: which grid, and which pixels go where."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.images import Pixels
from megatron_vita.media.tiling import Grid, Tiling, choose_grid, cut_tiles, grids_of, num_tiles
from tests.media.picture_files import photograph

LLAVA_NEXT = (Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(1, 3), Grid(3, 1))


def tiling_of(
    side: int = 448, *, min_tiles: int = 1, max_tiles: int = 12, anyres: bool = False
) -> Tiling:
    return Tiling(side, grids_of(min_tiles, max_tiles), anyres)


def grid_of(width: int, height: int, **limits: Any) -> Grid:
    return choose_grid((width, height), tiling_of(**limits))


def cut(image: Image.Image, grid: Grid, tiling: Tiling, tiles: range | None = None) -> np.ndarray:
    wanted = tiles if tiles is not None else range(num_tiles(grid))
    out = np.full((len(wanted), 3, tiling.tile_size, tiling.tile_size), 99, dtype=np.uint8)
    cut_tiles(Pixels(np.array(image), 1), grid, tiling=tiling, tiles=wanted, out=out)
    return out


def sizes(count: int, most: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(1, most, (count, 2)).tolist()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((640, 480), (4, 3)),
        ((1920, 1080), (4, 2)),
        ((1000, 1000), (3, 3)),
        ((3000, 3000), (3, 3)),
        ((1, 5000), (1, 12)),
        ((5000, 1), (12, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_known_sizes_get_the_grids_of_the_reference(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert grid_of(*size) == grid


def test_no_other_grid_is_nearer_to_the_aspect_ratio() -> None:
    for width, height in sizes(200, 3000):
        chosen = grid_of(width, height, max_tiles=6)
        distances = {
            (cols, rows): abs(Fraction(width, height) - Fraction(cols, rows))
            for cols in range(1, 7)
            for rows in range(1, 7)
            if cols * rows <= 6
        }
        assert distances[chosen] == min(distances.values())


def test_dynamic_grids_are_those_of_hugging_face() -> None:
    for width, height in sizes(300, 2500):
        expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert grid_of(width, height) == expected


def test_an_image_takes_the_larger_of_equal_grids_only_with_more_than_half_its_pixels() -> None:
    assert grid_of(633, 633) == (1, 1)  # 2 x 2 needs more than 0.5 * 896 * 896 = 401,408 pixels
    assert grid_of(634, 634) == (2, 2)
    assert grid_of(950, 950) == (2, 2)  # 3 x 3 needs more than 903,168
    assert grid_of(951, 951) == (3, 3)


def test_among_equally_near_ratios_the_wider_one_of_few_pixels_does_not_win() -> None:
    assert grid_of(150, 100, max_tiles=2) == (1, 1)  # 1.5 lies between 1 and 2
    assert grid_of(1500, 1000, max_tiles=2) == (2, 1)


def test_min_tiles_keeps_small_grids_out() -> None:
    assert grid_of(448, 448, min_tiles=4) == (2, 2)
    assert grid_of(448, 448, min_tiles=5, max_tiles=5) == (1, 5)


def test_sizes_and_limits_without_a_grid_are_refused() -> None:
    for anyres in (False, True):
        with pytest.raises(DataError, match="0 x 5"):
            choose_grid((0, 5), tiling_of(anyres=anyres))
    with pytest.raises(ConfigError, match="3 to 2"):
        grids_of(3, 2)


def test_a_thumbnail_is_counted_only_with_more_than_one_cell() -> None:
    assert [num_tiles(grid) for grid in [(1, 1), (1, 2), (4, 3)]] == [1, 3, 13]


def test_tiles_are_the_thumbnail_and_then_the_cells_row_by_row() -> None:
    # rows x cols, a grey of its own for each
    cells = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    pixels = np.repeat(np.repeat(cells, 8, axis=0), 8, axis=1)
    image = Image.fromarray(np.stack([pixels, pixels + 1, pixels + 2], axis=-1))
    tiles = cut(image, Grid(3, 2), tiling_of(8))
    for index, grey in enumerate(cells.flatten()):
        assert (
            tiles[1 + index] == np.array([grey, grey + 1, grey + 2], np.uint8)[:, None, None]
        ).all()
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(tiles[0].astype(int) - thumbnail).max() <= 1


@pytest.mark.parametrize("anyres", [False, True])
def test_a_thumbnail_that_comes_last_leaves_the_cells_as_they_are(anyres: bool) -> None:
    first = tiling_of(16, max_tiles=6, anyres=anyres)
    image = photograph((400, 150))
    last = first._replace(thumbnail_last=True)
    grid = choose_grid(image.size, first)
    assert num_tiles(grid) > 3
    tiles = cut(image, grid, first)
    moved = cut(image, grid, last)
    assert (moved == np.concatenate([tiles[1:], tiles[:1]])).all()
    one = Grid(1, 1)
    assert (cut(image, one, first) == cut(image, one, last)).all()


def test_internvls_tiles_are_in_the_order_of_its_image_processor() -> None:
    image = photograph((700, 230))
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6,
        do_normalize=False, do_rescale=False,
    )(image, return_tensors="np")["pixel_values"]  # fmt: skip
    tiling = tiling_of(56, max_tiles=6)._replace(thumbnail_last=True)
    ours = cut(image, choose_grid(image.size, tiling), tiling)
    assert theirs.shape == ours.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int)).reshape(len(ours), -1).mean(axis=1)
    assert difference.max() < 1
    assert np.abs(ours[0].astype(int) - theirs[-1].astype(int)).mean() > 3


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("thumbnail_last", [False, True])
@pytest.mark.parametrize("size", [(37, 53), (400, 30), (1203, 907)])
def test_any_part_of_the_tiles_is_the_same_as_in_all(
    size: tuple[int, int], anyres: bool, thumbnail_last: bool
) -> None:
    image = photograph(size)
    tiling = tiling_of(16, max_tiles=6, anyres=anyres)
    tiling = tiling._replace(thumbnail_last=thumbnail_last)
    grid = choose_grid(size, tiling)
    whole = cut(image, grid, tiling)
    count = len(whole)
    for part in (
        range(0, 1),
        range(0, 2),
        range(1, count),
        range(2, 3),
        range(count - 1, count),
        range(1, 1),
    ):
        assert (cut(image, grid, tiling, part) == whole[part.start : part.stop]).all()


def test_an_image_of_one_cell_is_one_tile() -> None:
    for anyres in (False, True):
        assert (
            cut(Image.new("RGB", (50, 20), "red"), Grid(1, 1), tiling_of(8, anyres=anyres))[0, 0]
            == 255
        ).all()


@pytest.mark.parametrize("grids", [LLAVA_NEXT, LLAVA_NEXT[::-1], grids_of(1, 9)[::-1]])
def test_anyres_grids_are_those_of_llava_next(grids: tuple[Grid, ...]) -> None:
    resolutions = [(336 * grid.rows, 336 * grid.cols) for grid in grids]
    for width, height in [*sizes(300, 2500), [500, 500], [90, 100], [1, 700]]:
        best = select_best_resolution((height, width), resolutions)
        grid = choose_grid((width, height), Tiling(336, grids, True))
        assert (336 * grid.rows, 336 * grid.cols) == best


@pytest.mark.parametrize("size", [(300, 500), (501, 300), (90, 90), (57, 400), (200, 113)])
def test_anyres_tiles_are_those_of_llava_next(size: tuple[int, int]) -> None:
    square = {"height": 56, "width": 56}
    points = [[56 * grid.rows, 56 * grid.cols] for grid in LLAVA_NEXT]
    reference = LlavaNextImageProcessorPil(
        size=square,
        crop_size=square,
        image_grid_pinpoints=points,
        do_rescale=False,
        do_normalize=False,
    )
    image = photograph(size)
    tiling = Tiling(56, LLAVA_NEXT, True)
    expected = reference(image, return_tensors="np")["pixel_values"][0]
    tiles = cut(image, choose_grid(size, tiling), tiling)
    assert tiles.shape == expected.shape
    assert np.abs(tiles.astype(int) - expected).max() <= 1
