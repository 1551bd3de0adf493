"""The pixels of a document's media: the tiles of an image, the frames of a video."""

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
    """Tiles `tiles` of a medium, uint8 [n,3,S,S], in `out` if given; of a video only these frames
    are decoded, and `report` is told of those that stand for damaged ones.

    Raises DataError, which names the medium by `name`, if it cannot be decoded.
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
