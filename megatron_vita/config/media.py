"""How images become tiles and videos become frames."""

from dataclasses import dataclass

from megatron_vita.config.fields import described, require

NORMALIZATIONS = ("imagenet", "clip", "siglip")


@dataclass(kw_only=True)
class MediaConfig:
    """Tiling, frame sampling and pixel normalisation."""

    min_tiles: int = described(1, "Fewest tiles an image is cut into.")
    max_tiles: int = described(12, "Most tiles an image is cut into, its thumbnail not counted.")
    max_fps: float = described(1.0, "Most frames taken from one second of video.")
    max_frames: int = described(128, "Most frames taken from one video.")
    normalization: str = described("imagenet", "Mean and deviation of pixel values: imagenet, clip or siglip.")

    def __post_init__(self) -> None:
        require(
            1 <= self.min_tiles <= self.max_tiles,
            f"media.min_tiles is {self.min_tiles} and media.max_tiles {self.max_tiles}: "
            "1 <= min_tiles <= max_tiles is needed",
        )
        require(self.max_fps > 0, f"media.max_fps is {self.max_fps}: it must be positive")
        require(self.max_frames >= 1, f"media.max_frames is {self.max_frames}: it must be at least 1")
        require(
            self.normalization in NORMALIZATIONS,
            f"media.normalization is {self.normalization!r}; known: {', '.join(NORMALIZATIONS)}",
        )
