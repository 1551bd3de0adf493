"""Decoding of a document's media: tiles of images, frames of videos."""

import numpy as np

from megatron_vita.data.samples.encoding import Medium, TileFormat
from megatron_vita.media.files import File, opened
from megatron_vita.media.images import read_pixels
from megatron_vita.media.tiling import cut_tiles
from megatron_vita.media.video import Report, decode_frames


def decode_tiles(
    medium: Medium,
    data: File,
    *,
    name: str,
    tiles: range,
    tile_format: TileFormat,
    out: np.ndarray | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Decode tiles `tiles` of a medium to uint8 [n, 3, S, S]; of a video, only these frames.

    Args:
        medium: the image or video.
        data: its file.
        name: name of the medium in errors and reports.
        tiles: range of tiles.
        tile_format: settings of the recipe.
        out: array to write into; None allocates one.
        report: called for frames that replace damaged ones.

    Raises:
        DataError: naming the medium by `name`: it cannot be decoded.
    """
    if out is None:
        out = np.empty((len(tiles), 3, tile_format.size, tile_format.size), dtype=np.uint8)
    if medium.grid is None:
        times = medium.times[tiles.start : tiles.stop]
        return decode_frames(
            data,
            name,
            times=times,
            tile_size=tile_format.size,
            normalization=tile_format.normalization,
            fit=tile_format.video_fit,
            out=out,
            report=report,
        )
    cut_tiles(
        read_pixels(opened(data).read(), name),
        medium.grid,
        tiling=tile_format.tiling,
        tiles=tiles,
        out=out,
    )
    return out
