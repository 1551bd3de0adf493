"""Tiling limits, normalization and frame sampling in a folder's config and processor files."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita.config import MediaConfig, VisionConfig
from megatron_vita.convert.families.config_file import Config
from megatron_vita.errors import CheckpointError
from megatron_vita.media.normalization import NORMALIZATION

PROCESSOR = "processor_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
Fields = dict[str, Any]
BICUBIC = 3  # Pillow's number
# With a fixed number of frames the rate must not limit them further.
ANY_RATE = 1000.0  # frames a second, more than videos have
# Defaults of transformers' processors, for folders that do not give the numbers.
_OF_TOWERS = {"clip": "clip", "eva": "clip", "siglip": "siglip"}
_OF_PROCESSORS = {"Clip": "clip", "CLIP": "clip", "GotOcr2": "clip", "Siglip": "siglip"}
_IDLE = {
    **dict.fromkeys(
        ("image_processor_type", "feature_extractor_type", "processor_class"), "a note"
    ),
    **dict.fromkeys(("video_processor_type", "auto_map", "transformers_version"), "a note"),
    **dict.fromkeys(
        ("return_metadata", "video_metadata", "model_input_names"),
        "of what transformers gives back",
    ),
    **dict.fromkeys(
        ("return_tensors", "data_format", "input_data_format", "device", "disable_grouping"),
        "the form in which transformers gives pixels, not their values",
    ),
    **dict.fromkeys(
        ("do_resize", "default_to_square", "do_convert_rgb", "do_pad", "pad_size"),
        "tiles are always cut from RGB and of the tower's size",
    ),
    "crop_to_patches": "InternVL's processor overrules it: images are always tiled",
}
_GEOMETRY = dict.fromkeys(
    ("size", "crop_size", "do_center_crop"),
    "of a tower used alone: here media.tiling says what of an image a tile shows",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Processors:
    """A folder's processor files; a missing file is a Config without fields.

    transformers 5 writes all of them into processor_config.json and prefers it to the others.
    """

    whole: Config
    images: Config
    videos: Config

    @classmethod
    def read(cls, folder: Path) -> "Processors":
        """Read all processor files; CheckpointError for an unreadable one."""
        whole = Config.read_if_present(folder, PROCESSOR)
        images, videos = (
            whole.part(part) if whole.get(part) else Config.read_if_present(folder, file)
            for part, file in (
                ("image_processor", IMAGE_PROCESSOR),
                ("video_processor", VIDEO_PROCESSOR),
            )
        )
        return cls(whole=whole, images=images, videos=videos)

    def refuse_unread(self, ignored: Collection[str]) -> None:
        """Raise CheckpointError for the first field that was never read."""
        for config in (self.whole, self.images, self.videos):
            config.refuse_unread(ignored)


def read_media(
    folder_format: str, config: Config, *, processors: Processors, vision: VisionConfig
) -> MediaConfig:
    """Read tiling limits, normalization and frame sampling of a folder with a vision tower.

    A field that the folder does not give keeps its default.

    Raises:
        CheckpointError: the folder's preprocessing differs from ours; the message names file and
            field.
    """
    images = processors.images
    videos = processors.videos
    image_size = vision.image_size
    rows = vision.image_token_length
    processors.whole.must_be("image_seq_length", (rows,), rows)
    processors.whole.disregard(_IDLE)
    kind = folder_format.removesuffix("-prefixed")
    fields: dict[str, Any] = {"normalization": _normalization(images, _default(images, kind))}
    # InternVL's processor resizes frames to the tile without keeping their aspect ratio.
    if kind.startswith("internvl-"):
        fields["video_fit"] = "squash"
    if kind == "internvl-chat":
        fields |= chat_tiling(config)
        images.disregard(_GEOMETRY)
    elif kind == "internvl-hf":
        fields |= _hf_tiling(images, image_size)
    else:
        images.disregard(_GEOMETRY)
    _check_resampling(images, is_tower=not kind.startswith("internvl-"))
    if videos.values:
        _check_videos(videos, fields["normalization"], image_size)
        fields |= _frames(videos)
    with config.naming():
        return MediaConfig(**fields)


def _default(images: Config, kind: str) -> str:
    """Normalization of a folder that gives none: the default of its processor class, else of its
    tower."""
    named = str(images.get("image_processor_type") or images.get("feature_extractor_type") or "")
    for beginning, normalization in _OF_PROCESSORS.items():
        if named.startswith(beginning):
            return normalization
    return _OF_TOWERS.get(kind, "imagenet")


def _normalization(images: Config, default: str) -> str | list[list[float]]:
    """Normalization by its name, or as [mean, deviation] where it has none."""
    images.must_be("do_rescale", (True,), True)
    factor = images.number("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise images.wrong("rescale_factor", "only 1 / 255 is supported")
    if not images.flag("do_normalize", True):
        images.disregard(("image_mean", "image_std"))
        # Without normalization the values in [0, 1] go into the tower as they are.
        return [[0.0] * 3, [1.0] * 3]
    usual = NORMALIZATION[default]
    mean = _color(images, "image_mean", list(usual[0]))
    deviation = _color(images, "image_std", list(usual[1]))
    for name, colors in NORMALIZATION.items():
        if [list(color) for color in colors] == [mean, deviation]:
            return name
    return [mean, deviation]


def _color(images: Config, name: str, default: list[float]) -> list[float]:
    value = images.get(name, default)
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(isinstance(number, int | float) for number in values):
        raise images.wrong(name, "numbers of red, green and blue are needed")
    return [float(number) for number in values]


def chat_tiling(config: Config) -> dict[str, Any]:
    """Tiling limits of `internvl-chat`, from config.json."""
    config.must_be("pad2square", (False,), False)
    if not config.flag("dynamic_image_size", False):
        config.disregard(("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"))
        return {"min_tiles": 1, "max_tiles": 1}
    most = config.integer("max_dynamic_patch", 6)
    # With a single tile there is no thumbnail, whatever the flag says.
    if most > 1:
        config.must_be("use_thumbnail", (True,), False)
    config.disregard(("use_thumbnail",))
    return {"min_tiles": config.integer("min_dynamic_patch", 1), "max_tiles": most}


def _hf_tiling(images: Config, image_size: int) -> dict[str, Any]:
    """Tiling limits of `internvl-hf`, from the image processor."""
    images.must_be("do_center_crop", (False,), False)
    images.disregard(("crop_size",))
    if images.side("size", image_size) != image_size:
        raise images.wrong("size", f"the tower takes tiles of {image_size} pixels")
    return {
        "min_tiles": images.integer("min_patches", 1),
        "max_tiles": images.integer("max_patches", 12),
    }


def _check_resampling(images: Config, *, is_tower: bool) -> None:
    """Check that images are resized by Pillow's bicubic filter. A tower alone only causes a
    warning: it will be trained with ours."""
    images.disregard(_IDLE)
    found = images.get("resample", BICUBIC)
    if found == BICUBIC:
        return
    if not is_tower:
        raise images.wrong("resample", f"only {BICUBIC} (bicubic) is supported")
    logger.warning(
        "%s: resample is %s; images are resized by the bicubic filter (3) here", images.where, found
    )


def _check_videos(videos: Config, normalization: str | list[list[float]], image_size: int) -> None:
    """Check that frames are normalized and resized as images are."""
    # One tower sees both, and the recipe has one normalization.
    if _normalization(videos, "clip") != normalization:
        raise videos.wrong("image_mean", "frames must be normalized as images are")
    if videos.side("size", image_size) != image_size:
        raise videos.wrong("size", f"the tower takes frames of {image_size} pixels")
    videos.must_be("resample", (BICUBIC,), BICUBIC)
    videos.must_be("do_center_crop", (False,), False)
    # transformers fills the video processor's fields from those of the image processor, too.
    videos.disregard((*_IDLE, "min_patches", "max_patches"))


def _frames(videos: Config) -> dict[str, Any]:
    """Frame limits of a processor that samples frames itself: the middles of equal segments, as
    ours."""
    videos.disregard(("crop_size", "initial_shift", "num_frames", "fps"))
    if not videos.flag("do_sample_frames", False):
        return {}
    videos.must_be("initial_shift", (True,), True)
    if videos.get("num_frames") is not None:
        return {"max_frames": videos.integer("num_frames"), "max_fps": ANY_RATE}
    if videos.get("fps") is not None:
        return {"max_fps": videos.number("fps")}
    return {}


def processor_files(media: MediaConfig, vision: VisionConfig, folder: Path) -> dict[str, Fields]:
    """Processor files of transformers' InternVL, by name; empty where `folder` already agrees."""
    if _says(folder, media, vision):
        return {}
    mean, deviation = _numbers(media.normalization)
    side = {"height": vision.image_size, "width": vision.image_size}
    pixels: Fields = {
        "do_resize": True,
        "size": side,
        "resample": BICUBIC,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
        "processor_class": "InternVLProcessor",
    }
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": media.min_tiles,
        "max_patches": media.max_tiles,
    }
    return {
        IMAGE_PROCESSOR: pixels | images,
        VIDEO_PROCESSOR: pixels | {"video_processor_type": "InternVLVideoProcessor"},
        PROCESSOR: {
            "processor_class": "InternVLProcessor",
            "image_seq_length": vision.image_token_length,
        },
    }


def _says(folder: Path, media: MediaConfig, vision: VisionConfig) -> bool:
    processors = Processors.read(folder)
    if not processors.images.values:
        return False
    try:
        said = read_media("internvl-hf", Config({}, ""), processors=processors, vision=vision)
    except CheckpointError:
        # Files of another format: OpenGVLab's processors, for one, say that images are cropped.
        return False
    # Frame limits are not compared: transformers' processor has no fields for all of ours.
    decisive = ("normalization", "min_tiles", "max_tiles")
    return all(getattr(said, name) == getattr(media, name) for name in decisive)


def _numbers(normalization: str | list[list[float]]) -> tuple[list[float], list[float]]:
    if isinstance(normalization, str):
        mean, deviation = NORMALIZATION[normalization]
    else:
        mean, deviation = normalization
    return list(mean), list(deviation)
