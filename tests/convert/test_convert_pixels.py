"""A folder's preprocessing becomes recipe fields that give its processor's pixels, or is refused by
name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vita.checkpoint.store import read_manifest
from megatron_vita.config import MediaConfig, Recipe, load_recipe, recipe_from_dict
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.folder_formats import INTERNVL_HF, format_of
from megatron_vita.convert.families.pixels import Processors, read_media
from megatron_vita.convert.importing import import_weights, plan_import
from megatron_vita.convert.settings.export_prompts import warn_of_differences
from megatron_vita.convert.sources import open_source
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.media.normalize import normalize
from tests.convert.published import CONFIGS, PREPROCESSORS, PROCESSOR, change
from tests.convert.toy_folders import model_of, save, save_chat, save_vision, tower_of

ODD = [[0.5, 0.25, 0.125], [0.25, 0.5, 1.0]]


def media_of(name: str, folder: Path, *, config: dict | None = None, **files: dict) -> MediaConfig:
    """Media settings of a published folder with some fields of its processor files replaced."""
    described = Config(CONFIGS[name] | (config or {}), "config.json")
    folder_format = format_of(described)
    heads = {"lm_head.weight", "language_model.lm_head.weight"}
    vision = folder_format.read(described, heads).vision
    change(folder, "preprocessor_config.json", **(PREPROCESSORS[name] | files.pop("images", {})))
    for file, fields in files.items():
        change(folder, f"{file}.json", **fields)
    processors = Processors.read(folder)
    media = read_media(folder_format.name, described, processors=processors, vision=vision)
    processors.refuse_unread(())
    described.refuse_unread()
    return media


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("internvl3-1b-chat", "imagenet"),
        ("internvl2.5-1b-chat", "imagenet"),
        ("internvl3-1b-hf", "imagenet"),
        ("internvit-300m", "imagenet"),
        ("clip-l-336", "clip"),
        ("siglip-so400m-384", "siglip"),
    ],
)
def test_published_processors_are_read_whole(name: str, normalization: str, tmp_path: Path) -> None:
    media = media_of(name, tmp_path)
    assert (media.normalization, media.min_tiles, media.max_tiles) == (normalization, 1, 12)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [("internvl3-1b-chat", "imagenet"), ("clip-l-336", "clip"), ("siglip-so400m-384", "siglip")],
)
def test_a_folder_without_a_processor_has_the_normalization_of_its_family(
    name: str, normalization: str, tmp_path: Path
) -> None:
    described = Config(CONFIGS[name], "config.json")
    folder_format = format_of(described)
    vision = folder_format.read(described, {"language_model.lm_head.weight"}).vision
    media = read_media(
        folder_format.name, described, processors=Processors.read(tmp_path), vision=vision
    )
    assert media.normalization == normalization


def test_limits_of_tiles_and_frames_are_those_of_the_folder(tmp_path: Path) -> None:
    chat = media_of(
        "internvl3-1b-chat", tmp_path, config={"max_dynamic_patch": 6, "min_dynamic_patch": 2}
    )
    assert (chat.min_tiles, chat.max_tiles) == (2, 6)
    single = media_of("internvl3-1b-chat", tmp_path, config={"dynamic_image_size": False})
    assert single.max_tiles == 1
    frames = {"do_sample_frames": True, "num_frames": 8, "size": {"height": 448, "width": 448}}
    hf = media_of(
        "internvl3-1b-hf",
        tmp_path,
        images={"max_patches": 4},
        video_preprocessor_config=frames | COLORS,
    )
    assert (hf.max_tiles, hf.max_frames) == (4, 8)


def test_the_newer_form_of_processor_files_is_read_first(tmp_path: Path) -> None:
    inner = PREPROCESSORS["internvl3-1b-hf"] | {"image_mean": ODD[0], "image_std": ODD[1]}
    media = media_of(
        "internvl3-1b-hf",
        tmp_path,
        processor_config={"image_processor": inner, "image_seq_length": 256},
    )
    assert media.normalization == ODD


SAVED = {"return_metadata": False, "initial_shift": True, "do_sample_frames": False}
SAVED_IMAGES = {"crop_to_patches": False, "min_patches": 1, "max_patches": 12, "resample": 3}
COLORS = {name: PREPROCESSORS["internvl3-1b-hf"][name] for name in ("image_mean", "image_std")}


@pytest.mark.parametrize("sampled", [{}, {"do_sample_frames": True, "num_frames": 8}])
def test_processors_that_transformers_saved_again_come_in(sampled: dict, tmp_path: Path) -> None:
    """Its video processor, read from a folder without one, has the image processor's fields."""
    pixels: dict[str, Any] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    pixels |= {"size": {"height": 448, "width": 448}, "default_to_square": True} | COLORS
    videos = SAVED | SAVED_IMAGES | pixels | sampled
    videos |= {"video_processor_type": "InternVLVideoProcessor", "data_format": "channels_first"}
    images = SAVED_IMAGES | pixels | {"image_processor_type": "GotOcr2ImageProcessor"}
    whole = PROCESSOR | {"image_processor": images, "video_processor": videos}
    media = media_of("internvl3-1b-hf", tmp_path, processor_config=whole)
    frames = sampled.get("num_frames", 128)
    assert (media.normalization, media.max_tiles, media.max_frames) == ("imagenet", 12, frames)


@pytest.mark.parametrize(
    ("name", "config", "images", "said"),
    [
        ("internvl3-1b-hf", {}, {"resample": 2}, "resample is 2"),
        ("internvl3-1b-hf", {}, {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("internvl3-1b-hf", {}, {"do_rescale": False}, "do_rescale is False"),
        ("internvl3-1b-hf", {}, {"do_center_crop": True}, "do_center_crop is True"),
        ("internvl3-1b-hf", {}, {"size": {"height": 384, "width": 384}}, "size is .*448 pixels"),
        ("internvl3-1b-hf", {}, {"image_mean": [0.5, 0.5]}, "image_mean is"),
        ("internvl3-1b-hf", {}, {"image_std": [0.5, 0.0, 0.5]}, "positive deviations"),
        ("internvl3-1b-hf", {}, {"sharpen": 1.5}, "sharpen is 1.5.*--ignore-field"),
        ("internvl3-1b-chat", {"pad2square": True}, {}, "pad2square is True"),
        ("internvl3-1b-chat", {"use_thumbnail": False}, {}, "use_thumbnail is False"),
    ],
)
def test_pixels_that_are_made_otherwise_are_refused_by_field(
    name: str, config: dict, images: dict, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"config.json.*{said}"):
        media_of(name, tmp_path, config=config, images=images)


def test_frames_that_are_normalized_otherwise_than_images_are_refused(tmp_path: Path) -> None:
    clip = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json: image_mean"):
        media_of("internvl3-1b-hf", tmp_path, video_preprocessor_config=clip)


def test_a_tower_that_was_resized_by_another_filter_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    media_of("siglip-so400m-384", tmp_path, images={"resample": 2})
    assert "resample is 2" in caplog.text


@pytest.mark.parametrize(
    ("mean", "deviation"), [([0.5] * 3, [0.5] * 3), (None, None), (ODD[0], ODD[1])]
)
def test_pixels_of_a_converted_tower_are_its_processors(
    mean: list[float] | None, deviation: list[float] | None, tmp_path: Path
) -> None:
    save(model_of("qwen2"), tmp_path / "llm")
    tower_of("siglip").save_pretrained(tmp_path / "tower")
    kind = SiglipImageProcessorPil if mean else CLIPImageProcessorPil
    colors = {"image_mean": mean, "image_std": deviation} if mean else {}
    processor = kind(**colors, size={"height": 56, "width": 56}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "tower")
    import_weights([tmp_path / "llm", tmp_path / "tower"], tmp_path / "ours", projector="long_vita")
    recipe = recipe_from_dict(read_manifest(tmp_path / "ours")["recipe"])
    assert recipe.media == load_recipe(tmp_path / "ours" / "model.yaml").media
    picture = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    theirs = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    tiles = torch.from_numpy(picture).permute(2, 0, 1)[None]
    assert (normalize(tiles, recipe.media.normalization) - theirs).abs().max() < 1e-5


def test_a_recipe_to_build_on_says_of_pixels_what_the_folder_says_and_no_more(
    tmp_path: Path,
) -> None:
    """A stage's own frame limits stay, whatever the order of its bases."""
    save_chat(model_of("internvl-hf"), tmp_path / "chat")
    change(tmp_path / "chat", dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=4)
    change(tmp_path / "chat", "preprocessor_config.json", image_mean=[0.5] * 3, image_std=[0.5] * 3)
    import_weights([tmp_path / "chat"], tmp_path / "ours", projector="internvl")
    said = yaml.safe_load((tmp_path / "ours" / "model.yaml").read_text())["media"]
    assert said == {"max_tiles": 4, "normalization": "siglip", "video_fit": "squash"}


def test_a_new_model_takes_frames_as_the_processor_of_its_export_does(tmp_path: Path) -> None:
    parts = [save(model_of("qwen2"), tmp_path / "llm"), save_vision(tmp_path / "vit")]
    for projector, fit in (("internvl", "squash"), ("long_vita", "letterbox")):
        plan = plan_import([open_source(part) for part in parts], projector=projector)
        assert plan.recipe.media.video_fit == fit


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("media", "video_fit", "letterbox"),
        ("media", "tiling", "anyres"),
        ("media", "grids", ["2x1"]),
        ("text", "media_format", "long_vita"),
    ],
)
def test_an_export_tells_of_settings_that_its_format_cannot_say(
    group: str, name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe().replaced({"media.video_fit": "squash", "text.media_format": "internvl"})
    warn_of_differences(INTERNVL_HF, recipe)
    assert caplog.text == ""
    warn_of_differences(INTERNVL_HF, recipe.replaced({f"{group}.{name}": value}))
    assert f"{group}.{name} is {value!r}, but format internvl-hf means" in caplog.text


def test_fields_that_are_ignored_by_name_come_in(tmp_path: Path) -> None:
    folder = save_vision(tmp_path / "vit")
    change(folder, my_note="kept")
    llm = save(model_of("qwen2"), tmp_path / "llm")
    with pytest.raises(CheckpointError, match="my_note is 'kept'"):
        import_weights([llm, folder], tmp_path / "ours", projector="internvl")
    import_weights([llm, folder], tmp_path / "ours", projector="internvl", ignored=["my_note"])
    assert json.loads((tmp_path / "ours/hugging_face/internvit-hf/config.json").read_text())


@pytest.mark.parametrize("wrong", ["vgg", [[0.5] * 3], [[0.5] * 3, [0.5, 0.0, 0.5]], [[1], [1]]])
def test_a_recipe_refuses_a_normalization_that_is_none(wrong: object, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"media": {"normalization": wrong}}))
    with pytest.raises(ConfigError, match=r"media\.normalization is .*known: imagenet"):
        load_recipe(tmp_path / "r.yaml")
