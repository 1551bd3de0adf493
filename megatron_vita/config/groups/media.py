"""Tiling of images, sampling of video frames and normalization of pixels."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from megatron_vita.config.parsing.fields import Form, check_fields, described, require

NormalizationName = Literal["imagenet", "clip", "siglip"]
GRID = Form(pattern=r"[1-9]\d{0,2}x[1-9]\d{0,2}", name="COLSxROWS")
NORMALIZATIONS: tuple[NormalizationName, ...] = get_args(NormalizationName)


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """Preprocessing of images and videos."""

    tiling: Literal["dynamic", "anyres"] = described(
        "dynamic",
        "Tiling of images: dynamic (InternVL) resizes to the grid of the nearest aspect ratio; "
        "anyres (LLaVA-NeXT) keeps the aspect ratio, padded with black, in the grid that keeps "
        "most pixels.",
    )
    grids: list[str] = described(
        [],
        "Allowed grids, as 2x1; of equally good ones the first is taken; empty: all of "
        "min_tiles to max_tiles.",
        form=GRID,
    )
    min_tiles: int = described(1, "Minimum number of tiles of an image.", ge=1)
    max_tiles: int = described(12, "Maximum number of tiles of an image, without its thumbnail.")
    max_fps: float = described(1.0, "Maximum number of frames sampled per second of video.", gt=0)
    max_frames: int = described(128, "Maximum number of frames sampled from one video.", ge=1)
    video_fit: Literal["letterbox", "squash"] = described(
        "letterbox",
        "Resizing of frames to square tiles: letterbox (Long-VITA) keeps the aspect ratio, "
        "padded with the mean colour; squash (InternVL) does not.",
    )
    normalization: NormalizationName | list[list[float]] = described(
        "imagenet",
        "Mean and standard deviation of pixel values: imagenet, clip, siglip, or [[means of red, "
        "green, blue], [deviations]], on a scale of 0 to 1.",
    )

    def __post_init__(self) -> None:
        check_fields(self, "media.")
        require(
            self.min_tiles <= self.max_tiles,
            f"media.min_tiles is {self.min_tiles} and media.max_tiles {self.max_tiles}: "
            "min_tiles <= max_tiles is needed",
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
