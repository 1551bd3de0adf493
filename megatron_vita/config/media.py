"""How images become tiles and videos become frames."""

import re
from dataclasses import dataclass
from math import isfinite

from megatron_vita.config.fields import described, require

NORMALIZATIONS = ("imagenet", "clip", "siglip")
VIDEO_FITS = ("letterbox", "squash")
TILINGS = ("dynamic", "anyres")


@dataclass(kw_only=True)
class MediaConfig:
    """Tiling, frame sampling and pixel normalisation."""

    tiling: str = described(
        "dynamic",
        "How images are cut: dynamic squashes them to the grid of the nearest shape (InternVL), "
        "anyres keeps their aspect ratio, on black, in the grid that keeps most pixels (LLaVA-NeXT).",
    )
    grids: list[str] = described(
        [],
        "Grids to choose from, as COLSxROWS, earlier ones first if alike; none: all of min_tiles to max_tiles.",
    )
    min_tiles: int = described(1, "Fewest tiles an image is cut into.")
    max_tiles: int = described(12, "Most tiles an image is cut into, its thumbnail not counted.")
    max_fps: float = described(1.0, "Most frames taken from one second of video.")
    max_frames: int = described(128, "Most frames taken from one video.")
    video_fit: str = described(
        "letterbox",
        "How a frame becomes a square tile: letterbox keeps its aspect ratio, on the mean colour "
        "(Long-VITA), squash does not (InternVL).",
    )
    normalization: str | list[list[float]] = described(
        "imagenet",
        "Mean and deviation of pixel values: imagenet, clip, siglip, or [[mean of red, green, blue], [deviation of each]] "
        "on a scale of 0 to 1.",
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
            f"media.normalization is {self.normalization!r}; known: {', '.join(NORMALIZATIONS)}, or "
            "[[red, green, blue], [red, green, blue]] with positive deviations",
        )


def _is_mean_and_deviation(value: str | list[list[float]]) -> bool:
    if isinstance(value, str) or [len(color) for color in value] != [3, 3]:
        return False
    return all(isfinite(number) for color in value for number in color) and min(value[1]) > 0
