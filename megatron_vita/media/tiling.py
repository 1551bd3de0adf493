"""Choice of an image's tile grid, and cutting of its tiles.

`dynamic` tiling squashes the image to the grid of the nearest aspect ratio (InternVL 1.5, arXiv
2404.16821); `anyres` tiling keeps its aspect ratio, on the black canvas of the grid that keeps most
of its pixels (LLaVA-NeXT). Both add a tile of the whole image squashed to a square, the thumbnail;
a grid of one cell consists of it alone.
"""

import functools
from typing import NamedTuple

import numpy as np

from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.images import Pixels
from megatron_vita.media.resize import Size, letterboxed, squashed

BLACK = (0, 0, 0)


class Grid(NamedTuple):
    """Columns and rows of tiles."""

    cols: int
    rows: int


class Tiling(NamedTuple):
    """Tiling of images: tiles of `tile_size` pixels a side, in one of `grids` in order of
    preference."""

    tile_size: int
    grids: tuple[Grid, ...]
    anyres: bool = False
    thumbnail_last: bool = False  # else it is the first tile


@functools.cache
def grids_of(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """List the grids of `min_tiles` to `max_tiles` cells, by ascending count and then width.

    Raises:
        ConfigError: there is none.
    """
    sides = range(1, max_tiles + 1)
    grids = [
        Grid(cols, rows)
        for cols in sides
        for rows in sides
        if min_tiles <= cols * rows <= max_tiles
    ]
    if not grids:
        raise ConfigError(
            f"no grid has {min_tiles} to {max_tiles} tiles: 1 <= min_tiles <= max_tiles is needed"
        )
    return tuple(sorted(grids, key=lambda grid: (grid.cols * grid.rows, grid.cols)))


def choose_grid(size: Size, tiling: Tiling) -> Grid:
    """Choose the grid for an image of `size` (width, height) in pixels.

    Raises:
        DataError: a side is not positive.
    """
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"image size is {width} x {height} pixels: both sides must be at least 1")
    if tiling.anyres:
        return _roomiest_grid(size, tiling)
    return _nearest_grid(size, tiling)


def _nearest_grid(size: Size, tiling: Tiling) -> Grid:
    """Grid whose cols/rows is nearest to width/height.

    Among equally near grids a later one wins only if the image has more than half as many pixels as
    that grid.
    """
    # Ratios are compared in float64, as in the Hugging Face image processor for InternVL, so that
    # choices are equal.
    width, height = size
    aspect = width / height
    cell = tiling.tile_size**2
    best = tiling.grids[0]
    best_distance = float("inf")
    for grid in tiling.grids:
        distance = abs(aspect - grid.cols / grid.rows)
        half_full = width * height > 0.5 * cell * grid.cols * grid.rows
        if distance < best_distance or (distance == best_distance and half_full):
            best = grid
            best_distance = distance
    return best


def _roomiest_grid(size: Size, tiling: Tiling) -> Grid:
    """Grid that keeps most of the image's pixels, and among those the one with the least empty
    area."""
    width, height = size

    # Sizes are rounded as in the Hugging Face image processor for LLaVA-NeXT, for equal choices.
    def merit(grid: Grid) -> tuple[int, int]:
        wide = grid.cols * tiling.tile_size
        high = grid.rows * tiling.tile_size
        scale = min(wide / width, high / height)
        shown = min(max(1, int(width * scale)) * max(1, int(height * scale)), width * height)
        return shown, shown - wide * high

    return max(tiling.grids, key=merit)


def num_tiles(grid: tuple[int, int]) -> int:
    """Number of tiles of an image cut into `grid`: its cells, and a thumbnail if several."""
    cells = grid[0] * grid[1]
    if cells > 1:
        return cells + 1
    return 1


def cut_tiles(pixels: Pixels, grid: Grid, *, tiling: Tiling, tiles: range, out: np.ndarray) -> None:
    """Write tiles `tiles` of an image into `out`, uint8 `[len(tiles), 3, S, S]`.

    The cells are ordered row by row, with the thumbnail before or after them. The image is resized
    to the grid once if any cell is requested.
    """
    side = tiling.tile_size
    number = num_tiles(grid)
    if tiling.thumbnail_last:
        cells = range(number - 1)
        thumbnail = number - 1
    else:
        cells = range(1, number)
        thumbnail = 0
    if thumbnail in tiles:
        out[thumbnail - tiles.start] = squashed(pixels, (side, side))
    wanted = range(max(tiles.start, cells.start), min(tiles.stop, cells.stop))
    if not wanted:
        return
    box = (grid.cols * side, grid.rows * side)
    if tiling.anyres:
        canvas = letterboxed(pixels, box, BLACK)
    else:
        canvas = squashed(pixels, box)
    for tile in wanted:
        row, col = divmod(tile - cells.start, grid.cols)
        out[tile - tiles.start] = canvas[
            :, row * side : row * side + side, col * side : col * side + side
        ]
