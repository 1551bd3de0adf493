"""Preprocessing settings of our own exports: processor_config.json to MediaConfig and back."""

from typing import Any

from megatron_vita.config import MediaConfig, VisionConfig
from megatron_vita.config.groups.media import NORMALIZATIONS, NormalizationName
from megatron_vita.convert.families.config_file import Config
from megatron_vita.media.normalization import NORMALIZATION, mean_and_deviation

_SAME = ("tiling", "min_tiles", "max_tiles", "max_fps", "max_frames", "video_fit")
"""Fields that have the same name and value in both."""


def vita_processor(media: MediaConfig, vision: VisionConfig) -> dict[str, Any]:
    """Fields of processor_config.json for the class in `exported/processing_vita.py`."""
    mean, deviation = mean_and_deviation(media.normalization)
    return {
        "processor_class": "VitaProcessor",
        "auto_map": {"AutoProcessor": "processing_vita.VitaProcessor"},
        "tile_size": vision.image_size,
        "image_seq_length": vision.image_token_length,
        "grids": [[int(side) for side in grid.split("x")] for grid in media.grids],
        "image_mean": list(mean),
        "image_std": list(deviation),
        **{name: getattr(media, name) for name in _SAME},
    }


def read_vita_processor(config: Config, vision: VisionConfig) -> MediaConfig:
    """Read what `vita_processor` has written.

    Raises:
        CheckpointError: a field is wrong, or its tiles are not the tower's.
    """
    config.disregard(("processor_class", "auto_map", "transformers_version"))
    config.must_be("tile_size", (vision.image_size,), vision.image_size)
    config.must_be("image_seq_length", (vision.image_token_length,), vision.image_token_length)
    fields = {name: config.get(name, getattr(MediaConfig, name)) for name in _SAME}
    colors = [config.need("image_mean"), config.need("image_std")]
    with config.naming():
        return MediaConfig(
            grids=["x".join(map(str, grid)) for grid in config.get("grids", [])],
            normalization=_named(colors),
            **fields,
        )


def _named(colors: list[list[float]]) -> NormalizationName | list[list[float]]:
    """Name of a normalization, or its mean and deviation where it has none."""
    for name in NORMALIZATIONS:
        if [list(color) for color in NORMALIZATION[name]] == colors:
            return name
    return colors
