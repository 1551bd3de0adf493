"""Dynamic tiling: which grid an image is cut into, and the cutting. Rules of InternVL 1.5 (arXiv 2404.16821)."""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from megatron_vita.errors import ConfigError, DataError


class Grid(NamedTuple):
    """Columns and rows of tiles."""

    cols: int
    rows: int


def choose_grid(size: tuple[int, int], *, tile_size: int, min_tiles: int, max_tiles: int) -> Grid:
    """The grid for an image of `size` (width, height) in pixels: the one whose cols/rows is nearest to width/height.

    Candidates have `min_tiles` to `max_tiles` tiles and are tried from few tiles to many, narrow ones first among equal
    counts. Among equally near grids a later one wins only if the image has more than half as many pixels as that grid.
    Ratios are compared in float64, so that choices equal those of the Hugging Face image processor for InternVL.

    Raises DataError if a side is not positive, ConfigError if no grid has such a number of tiles.
    """
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"image size is {width} x {height} pixels: both sides must be at least 1")
    aspect = width / height
    best, best_distance = Grid(1, 1), float("inf")
    for grid in _candidates(min_tiles, max_tiles):
        distance = abs(aspect - grid.cols / grid.rows)
        half_full = width * height > 0.5 * tile_size * tile_size * grid.cols * grid.rows
        if distance < best_distance or (distance == best_distance and half_full):
            best, best_distance = grid, distance
    return best


def num_tiles(grid: tuple[int, int]) -> int:
    """Tiles that an image cut into `grid` yields: one for each cell, and a thumbnail if there is more than one cell."""
    cells = grid[0] * grid[1]
    return cells + 1 if cells > 1 else 1


def cut_tiles(image: Image.Image, *, grid: tuple[int, int], tile_size: int) -> np.ndarray:
    """An RGB image as uint8 `[num_tiles(grid), 3, S, S]`: the thumbnail first, then the cells row by row.

    The image is squashed to the grid (and to the thumbnail) without regard to its aspect ratio, bicubic.
    """
    cols, rows = grid
    canvas = _resized(image, (cols * tile_size, rows * tile_size))
    cells = canvas.reshape(rows, tile_size, cols, tile_size, 3).transpose(0, 2, 4, 1, 3)
    cells = cells.reshape(rows * cols, 3, tile_size, tile_size)
    if len(cells) == 1:
        return np.ascontiguousarray(cells)
    thumbnail = _resized(image, (tile_size, tile_size)).transpose(2, 0, 1)
    return np.concatenate([thumbnail[None], cells])


@functools.cache
def _candidates(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    sides = range(1, max_tiles + 1)
    grids = [Grid(cols, rows) for cols in sides for rows in sides if min_tiles <= cols * rows <= max_tiles]
    if not grids:
        raise ConfigError(f"no grid has {min_tiles} to {max_tiles} tiles: 1 <= min_tiles <= max_tiles is needed")
    return tuple(sorted(grids, key=lambda grid: (grid.cols * grid.rows, grid.cols)))


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
