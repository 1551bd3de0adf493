"""Dynamic tiling: which grid, and which pixels go where."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.tiling import Grid, choose_grid, cut_tiles, num_tiles


def grid_of(width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12) -> Grid:
    return choose_grid((width, height), tile_size=448, min_tiles=min_tiles, max_tiles=max_tiles)


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
def test_known_sizes_get_the_grids_of_the_reference(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(*size) == grid


def test_no_other_grid_is_nearer_to_the_aspect_ratio() -> None:
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (200, 2)).tolist():
        chosen = grid_of(width, height, max_tiles=6)
        distances = {
            (cols, rows): abs(Fraction(width, height) - Fraction(cols, rows))
            for cols in range(1, 7)
            for rows in range(1, 7)
            if cols * rows <= 6
        }
        assert distances[chosen] == min(distances.values())


def test_an_image_takes_the_larger_of_equal_grids_only_with_more_than_half_its_pixels() -> None:
    assert grid_of(633, 633) == (1, 1)  # 2 x 2 needs more than 0.5 * 896 * 896 = 401,408 pixels
    assert grid_of(634, 634) == (2, 2)
    assert grid_of(950, 950) == (2, 2)  # 3 x 3 needs more than 903,168
    assert grid_of(951, 951) == (3, 3)


def test_among_equally_near_ratios_the_wider_one_of_few_pixels_does_not_win() -> None:
    assert choose_grid((150, 100), tile_size=448, min_tiles=1, max_tiles=2) == (1, 1)  # 1.5 lies between 1 and 2
    assert choose_grid((1500, 1000), tile_size=448, min_tiles=1, max_tiles=2) == (2, 1)


def test_min_tiles_keeps_small_grids_out() -> None:
    assert grid_of(448, 448, min_tiles=4) == (2, 2)
    assert grid_of(448, 448, min_tiles=5, max_tiles=5) == (1, 5)


def test_sizes_and_limits_without_a_grid_are_refused() -> None:
    with pytest.raises(DataError, match="0 x 5"):
        grid_of(0, 5)
    with pytest.raises(ConfigError, match="3 to 2"):
        grid_of(5, 5, min_tiles=3, max_tiles=2)


def test_a_thumbnail_is_counted_only_with_more_than_one_cell() -> None:
    assert [num_tiles(grid) for grid in [(1, 1), (1, 2), (4, 3)]] == [1, 3, 13]


def test_tiles_are_the_thumbnail_and_then_the_cells_row_by_row() -> None:
    cells = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # rows x cols, a grey of its own for each
    pixels = np.repeat(np.repeat(cells, 8, axis=0), 8, axis=1)
    image = Image.fromarray(np.stack([pixels, pixels + 1, pixels + 2], axis=-1))
    tiles = cut_tiles(image, grid=(3, 2), tile_size=8)
    assert tiles.shape == (num_tiles((3, 2)), 3, 8, 8)
    assert tiles.dtype == np.uint8
    for index, grey in enumerate(cells.flatten()):
        assert (tiles[1 + index] == np.array([grey, grey + 1, grey + 2], np.uint8)[:, None, None]).all()
    thumbnail = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (tiles[0] == thumbnail).all()


def test_tiles_equal_crops_of_the_resized_image() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    tiles = cut_tiles(image, grid=(3, 2), tile_size=16)
    resized = image.resize((48, 32), Image.Resampling.BICUBIC)
    for index in range(6):
        left, top = 16 * (index % 3), 16 * (index // 3)
        crop = np.asarray(resized.crop((left, top, left + 16, top + 16)))
        assert (tiles[1 + index] == crop.transpose(2, 0, 1)).all()


def test_an_image_of_one_cell_is_one_tile() -> None:
    assert cut_tiles(Image.new("RGB", (50, 20), "red"), grid=(1, 1), tile_size=8).shape == (1, 3, 8, 8)
