"""Modelling files in exports of the format long-vita, for which transformers has no class."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_vita.convert.exported as exported
from megatron_vita.config import Recipe
from megatron_vita.convert.families.folder_formats import LONG_VITA, FolderFormat
from megatron_vita.convert.families.pixels import PROCESSOR
from megatron_vita.convert.families.vision_config import write_internvit
from megatron_vita.convert.families.vita_processor import vita_processor
from megatron_vita.text.tokenizer_base import Tokenizer

FILES = ("configuration_vita.py", "modeling_vita.py", "processing_vita.py", "media_vita.py")
_MODEL = "modeling_vita.VitaForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_vita.VitaConfig",
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoProcessor": "processing_vita.VitaProcessor",
}
"""Classes of the modelling files, by transformers' classes that look for them."""
_CONTEXTS = ("<IMG_CONTEXT>", "<PATCH_CONTEXT>", "<VID_CONTEXT>")


def has_our_code(config: Mapping[str, Any]) -> bool:
    """Return true if a config.json names our modelling files."""
    # transformers keeps only the classes that it has loaded when it saves a model.
    named = config.get("auto_map") or {}
    return named.get("AutoConfig") == AUTO_MAP["AutoConfig"]


def takes_our_code(folder_format: FolderFormat, config: Mapping[str, Any]) -> bool:
    """Return true if an export gets our modelling files: it names no others."""
    return folder_format is LONG_VITA and (not config.get("auto_map") or has_our_code(config))


def write_code(folder: Path, recipe: Recipe, *, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write modelling files and processor settings.

    Returns:
        Fields that the modelling files read in config.json beside those of `config`.
    """
    for name in FILES:
        shutil.copyfile(Path(exported.__file__).with_name(name), folder / name)
    vision = recipe.model.vision
    settings = vita_processor(recipe.media, vision)
    (folder / PROCESSOR).write_text(json.dumps(settings, indent=2) + "\n")
    # A published config may leave defaults out, and give a side as a pair.
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return {
        "auto_map": AUTO_MAP,
        "architectures": ["VitaForConditionalGeneration"],
        "visual": write_internvit(vision, config["visual"], hf=False) | sides,
    }


def media_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the placeholders that the modelling files write, for config.json."""
    return [tokenizer.special_id(name) for name in _CONTEXTS]
