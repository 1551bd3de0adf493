"""Which grid an image is cut into, and the cutting.

Two ways: `dynamic` tiling squashes the image to the grid whose shape is nearest to its own
(InternVL 1.5, arXiv 2404.16821); `anyres` tiling keeps its aspect ratio, on the black canvas of the
grid that keeps most of its pixels (LLaVA-NeXT). In both one more tile, the thumbnail, is the whole
image, squashed to a square; it is the only one of a grid of one cell.
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
    """How images are cut into tiles of `tile_size` pixels a side: into one of `grids`, earlier ones
    first if alike."""

    tile_size: int
    grids: tuple[Grid, ...]
    anyres: bool = False
    thumbnail_last: bool = False  # else it is the first tile


@functools.cache
def grids_of(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All grids of `min_tiles` to `max_tiles` cells, from few to many, narrow ones first among
    equal counts.

    Raises ConfigError if there is none.
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
    """The grid for an image of `size` (width, height) in pixels. DataError if a side is not
    positive."""
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"image size is {width} x {height} pixels: both sides must be at least 1")
    return (_roomiest_grid if tiling.anyres else _nearest_grid)(size, tiling)


def _nearest_grid(size: Size, tiling: Tiling) -> Grid:
    """The grid whose cols/rows is nearest to width/height.

    Among equally near grids a later one wins only if the image has more than half as many pixels as
    that grid. Ratios are compared in float64, so that choices equal those of the Hugging Face image
    processor for InternVL.
    """
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
    """The grid that shows most of the image's pixels, and among those the one with least of its own
    left empty.

    Sizes are rounded as by Hugging Face's image processor for LLaVA-NeXT, so that choices are the
    same.
    """
    width, height = size

    def merit(grid: Grid) -> tuple[int, int]:
        wide = grid.cols * tiling.tile_size
        high = grid.rows * tiling.tile_size
        scale = min(wide / width, high / height)
        shown = min(max(1, int(width * scale)) * max(1, int(height * scale)), width * height)
        return shown, shown - wide * high

    return max(tiling.grids, key=merit)


def num_tiles(grid: tuple[int, int]) -> int:
    """Tiles that an image cut into `grid` yields: one for each cell, and a thumbnail if there is
    more than one cell."""
    cells = grid[0] * grid[1]
    if cells > 1:
        return cells + 1
    return 1


def cut_tiles(pixels: Pixels, grid: Grid, *, tiling: Tiling, tiles: range, out: np.ndarray) -> None:
    """Writes tiles `tiles` of an image into `out`, uint8 `[len(tiles), 3, S, S]`.

    The cells go row by row, the thumbnail before or after them. Tiles that are not asked for cost
    nothing but their share of one resizing to the grid, where any cell is asked for.
    """
    side = tiling.tile_size
    cells = range(num_tiles(grid) - 1)
    if not tiling.thumbnail_last:
        cells = range(1, len(cells) + 1)
    thumbnail = cells.stop if tiling.thumbnail_last else 0
    if thumbnail in tiles:
        out[thumbnail - tiles.start] = squashed(pixels, (side, side))
    wanted = range(max(tiles.start, cells.start), min(tiles.stop, cells.stop))
    if not wanted:
        return
    box = (grid.cols * side, grid.rows * side)
    canvas = letterboxed(pixels, box, BLACK) if tiling.anyres else squashed(pixels, box)
    for tile in wanted:
        row, col = divmod(tile - cells.start, grid.cols)
        out[tile - tiles.start] = canvas[
            :, row * side : row * side + side, col * side : col * side + side
        ]
