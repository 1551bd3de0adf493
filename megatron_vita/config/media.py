"""Tiling of images, sampling of video frames and normalization of pixels."""

import re
from dataclasses import dataclass
from math import isfinite

from megatron_vita.config.fields import described, require

NORMALIZATIONS = ("imagenet", "clip", "siglip")
VIDEO_FITS = ("letterbox", "squash")
TILINGS = ("dynamic", "anyres")


@dataclass(kw_only=True)
class MediaConfig:
    """Preprocessing of images and videos."""

    tiling: str = described(
        "dynamic",
        "Tiling of images: dynamic (InternVL) resizes to the grid of the nearest aspect ratio; "
        "anyres (LLaVA-NeXT) keeps the aspect ratio, padded with black, in the grid that keeps "
        "most pixels.",
    )
    grids: list[str] = described(
        [],
        "Allowed grids, as COLSxROWS; of equally good ones the first is taken; empty: all of "
        "min_tiles to max_tiles.",
    )
    min_tiles: int = described(1, "Minimum number of tiles of an image.")
    max_tiles: int = described(12, "Maximum number of tiles of an image, without its thumbnail.")
    max_fps: float = described(1.0, "Maximum number of frames sampled per second of video.")
    max_frames: int = described(128, "Maximum number of frames sampled from one video.")
    video_fit: str = described(
        "letterbox",
        "Resizing of frames to square tiles: letterbox (Long-VITA) keeps the aspect ratio, "
        "padded with the mean colour; squash (InternVL) does not.",
    )
    normalization: str | list[list[float]] = described(
        "imagenet",
        "Mean and standard deviation of pixel values: imagenet, clip, siglip, or [[means of red, "
        "green, blue], [deviations]], on a scale of 0 to 1.",
    )

    def __post_init__(self) -> None:
        require(
            1 <= self.min_tiles <= self.max_tiles,
            f"media.min_tiles is {self.min_tiles} and media.max_tiles {self.max_tiles}: "
            "1 <= min_tiles <= max_tiles is needed",
        )
        require(
            self.tiling in TILINGS, f"media.tiling is {self.tiling!r}; known: {', '.join(TILINGS)}"
        )
        require(
            self.video_fit in VIDEO_FITS,
            f"media.video_fit is {self.video_fit!r}; known: {', '.join(VIDEO_FITS)}",
        )
        for grid in self.grids:
            require(
                re.fullmatch(r"[1-9]\d{0,2}x[1-9]\d{0,2}", str(grid)) is not None,
                f"media.grids holds {grid!r}: COLSxROWS is needed, as 2x1",
            )
        require(self.max_fps > 0, f"media.max_fps is {self.max_fps}: it must be positive")
        require(
            self.max_frames >= 1, f"media.max_frames is {self.max_frames}: it must be at least 1"
        )
        require(
            self.normalization in NORMALIZATIONS or _is_mean_and_deviation(self.normalization),
            f"media.normalization is {self.normalization!r}; known: {', '.join(NORMALIZATIONS)}, "
            "or [[red, green, blue], [red, green, blue]] with positive deviations",
        )


def _is_mean_and_deviation(value: str | list[list[float]]) -> bool:
    if isinstance(value, str) or [len(color) for color in value] != [3, 3]:
        return False
    return all(isfinite(number) for color in value for number in color) and min(value[1]) > 0
