"""Tokenizer, chat template, processor files and generation defaults of an exported folder, so that
transformers builds the same prompts and pixels as the recipe."""

import json
import logging
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_vita.config import GenerationConfig, Recipe
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.folder_formats import INTERNVL_CHAT, INTERNVL_HF, FolderFormat
from megatron_vita.convert.families.generation import GENERATION, read_generation
from megatron_vita.convert.families.pixels import chat_tiling, processor_files
from megatron_vita.convert.settings.export_code import media_token_ids, takes_our_code, write_code
from megatron_vita.convert.settings.prompts import CONTEXT, NAMES, append_tokens
from megatron_vita.convert.settings.sidecar_files import has_tokenizer
from megatron_vita.errors import CheckpointError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from megatron_vita.text.origin import INTERNVL_SYSTEMS
from megatron_vita.text.own_template import OwnTemplate, takes_lists
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.vocabulary import tokens_needed

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_FLATTENED = (  # contents that are lists become texts, as InternVL's processor reads them
    "{% set flat = namespace(messages=[]) %}{% for m in messages %}{% set said = namespace(text='') %}"
    "{% if m.content is string %}{% set said.text = m.content %}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}{% set said.text = said.text + '<IMG_CONTEXT>\n' %}"
    "{% elif part.type == 'video' %}{% set said.text = said.text + '<video>\n' %}"
    "{% else %}{% set said.text = said.text + part.text %}{% endif %}{% endfor %}{% endif %}"
    "{% set flat.messages = flat.messages + [dict(m, content=said.text)] %}{% endfor %}"
    "{% set messages = flat.messages %}"
)
_TAGGED = (  # contents that are lists become texts with tags, as our own processor reads them
    "{% set flat = namespace(messages=[]) %}{% for m in messages %}"
    "{% set said = namespace(text='', medium=false) %}"
    "{% if m.content is string %}{% set said.text = m.content %}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}"
    "{% if said.medium and not part.text.startswith('\n') %}{% set said.text = said.text + '\n' %}{% endif %}"
    "{% set said.text = said.text + part.text %}"
    "{% else %}{% set said.text = said.text + ('<image>' if part.type == 'image' else '<video>') %}{% endif %}"
    "{% set said.medium = part.type != 'text' %}{% endfor %}{% endif %}"
    "{% set flat.messages = flat.messages + [dict(m, content=said.text)] %}{% endfor %}"
    "{% set messages = flat.messages %}"
)
_TEMPLATE = "internvl2_5"  # the name of OpenGVLab's prompt form
logger = logging.getLogger(__name__)


def complete_folder(
    folder: Path, *, folder_format: FolderFormat, recipe: Recipe, config: dict[str, Any]
) -> dict[str, Any]:
    """Add to a folder of sidecar files what only the recipe knows.

    Returns:
        Fields that are missing in its `config`.

    Raises:
        CheckpointError: transformers would give special tokens other ids than the trained ones, or
            the modelling files would write other placeholders.
    """
    if folder_format in (INTERNVL_HF, INTERNVL_CHAT):
        warn_of_differences(folder_format, recipe)
    fields = _media_fields(folder_format, recipe, config)
    our_code = takes_our_code(folder_format, config)
    if our_code:
        _check_media_format(recipe.text.media_format)
        fields |= write_code(folder, recipe, config=config)
    if folder_format is INTERNVL_HF:
        for name, content in processor_files(recipe.media, recipe.model.vision, folder).items():
            _write(folder / name, content)
    if "language_model" not in folder_format.parts:
        return fields
    fields |= _context_length(config, recipe)
    if not has_tokenizer(folder):
        if recipe.text.tokenizer:
            logger.warning(
                "%s: text.tokenizer %s is not a Hugging Face folder and is not exported",
                folder,
                recipe.text.tokenizer,
            )
        return fields
    # Read from the copied folder, which is what transformers will read.
    needed = tokens_needed(recipe.text, text_only=recipe.model.text_only)
    tokenizer = load_tokenizer(folder, added=needed)
    _complete_tokenizer(
        folder, tokenizer, folder_format=folder_format, recipe=recipe, our_code=our_code
    )
    if our_code:
        fields["media_token_ids"] = media_token_ids(tokenizer)
    _complete_generation(folder, tokenizer, recipe)
    if folder_format is INTERNVL_HF:
        fields["image_token_id"] = tokenizer.special_id(CONTEXT)
    return fields


def _context_length(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Length of training as the context of a new config, which names none."""
    nested = next((name for name in ("text_config", "llm_config") if name in config), None)
    language = config if nested is None else config[nested]
    if "max_position_embeddings" in language:
        return {}
    length = {"max_position_embeddings": recipe.data.seq_length}
    return length if nested is None else {nested: language | length}


def _check_media_format(media_format: str) -> None:
    """Refuse a model that knows other placeholders than the modelling files write."""
    if media_format != "long_vita":
        raise CheckpointError(
            f"text.media_format is {media_format!r}, but the modelling files of format long-vita "
            "write placeholders of 'long_vita' alone: export the model's parts, by --format"
        )


def warn_of_differences(folder_format: FolderFormat, recipe: Recipe) -> None:
    """Warn of settings that InternVL's formats have no fields for."""
    settings = {
        "text.media_format": "internvl",
        "media.tiling": "dynamic",
        "media.grids": [],
        "media.video_fit": "squash",
    }
    for name, written in settings.items():
        trained = attrgetter(name)(recipe)
        if trained != written:
            logger.warning(
                "%s is %r, but format %s means %r: loaded from it, the model gets other "
                "prompts or pixels than in training",
                name,
                trained,
                folder_format.name,
                written,
            )


def _media_fields(
    folder_format: FolderFormat, recipe: Recipe, config: dict[str, Any]
) -> dict[str, Any]:
    """Fields for tiling and prompts in config.json of `internvl-chat`, unless `config` has them
    already."""
    if folder_format is not INTERNVL_CHAT:
        return {}
    media = recipe.media
    said = chat_tiling(Config(config, ""))
    system = _system_field(recipe.text.system, config)
    if (
        said == {"min_tiles": media.min_tiles, "max_tiles": media.max_tiles}
        # An unchanged config.json stays identical to the origin's, byte for byte.
        and "template" in config
    ):
        return system
    return system | {
        "dynamic_image_size": media.max_tiles > 1,
        "min_dynamic_patch": media.min_tiles,
        "max_dynamic_patch": media.max_tiles,
        "use_thumbnail": True,
        "force_image_size": recipe.model.vision.image_size,
        "template": _TEMPLATE,
    }


def _system_field(system: str, config: dict[str, Any]) -> dict[str, Any]:
    """The default system turn, where it is not the one that OpenGVLab's format says already."""
    usual = INTERNVL_SYSTEMS[_TEMPLATE]
    if not system:
        logger.warning(
            "text.system is empty, but the code of format %s puts a system turn of its own before "
            "conversations that begin with none",
            INTERNVL_CHAT.name,
        )
    elif system != (config.get("system_message") or usual):
        return {"system_message": system}
    return {}


def _complete_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    folder_format: FolderFormat,
    recipe: Recipe,
    our_code: bool,
) -> None:
    """Write special tokens, the token names that a processor looks up, and the chat template."""
    # InternVL's processor looks tokens up by these names; without them it cannot be loaded.
    named = folder_format is INTERNVL_HF and not NAMES.keys() <= tokenizer.named_tokens.keys()
    if tokenizer.appended or named:
        append_tokens(folder, tokenizer, names=NAMES if named else {})
    template = tokenizer.chat_template
    if recipe.text.template == "chatml":
        template = _CHATML
    if recipe.text.system and template and folder_format is not INTERNVL_CHAT:
        template = _with_system(recipe.text.system, template)
    # A language model's own template knows no lists of parts, which the processor passes to it.
    if folder_format is INTERNVL_HF and template and CONTEXT not in template:
        template = _FLATTENED + template
    if our_code and template and not _takes_lists(tokenizer, recipe):
        template = _TAGGED + template
    if template != tokenizer.chat_template:
        _write_template(folder, template)


def _takes_lists(tokenizer: Tokenizer, recipe: Recipe) -> bool:
    """Tell whether the template of the recipe's prompts takes contents as lists of parts."""
    if recipe.text.template != "jinja":
        return False
    media_format = MEDIA_FORMATS[recipe.text.media_format]
    return takes_lists(OwnTemplate(tokenizer, media_format, recipe.text.date))


def _with_system(system: str, template: str) -> str:
    """A template that puts a default system turn before conversations that begin with none."""
    turn = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    begun = "messages and messages[0].role == 'system'"
    return f"{{% set messages = messages if {begun} else [{turn}] + messages %}}{template}"


def _write_template(folder: Path, template: str) -> None:
    """Write the chat template and remove every other one of the folder."""
    # transformers looks in three places; a template left in another one could be found first.
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    path = folder / "tokenizer_config.json"
    if path.exists():
        fields = json.loads(path.read_text())
        fields.pop("chat_template", None)
        _write(path, fields)


def _complete_generation(folder: Path, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Write end tokens and sampling defaults, unless generation_config.json has the same already."""
    path = folder / GENERATION
    before = json.loads(path.read_text()) if path.exists() else {}
    # The origin's file may hold more than we know, so it stays as it is where both agree.
    if before and read_generation(folder) == recipe.generation:
        return
    ends = sorted(ChatFormat(tokenizer, recipe.text).stop_ids)
    _write(path, {"eos_token_id": ends} | before | _drawing(recipe.generation))


def _drawing(generation: GenerationConfig) -> dict[str, Any]:
    """Sampling defaults as fields of generation_config.json."""
    drawn = {
        name: getattr(generation, name)
        for name in ("temperature", "top_k", "top_p")
        if getattr(generation, name) is not None
    }
    fields: dict[str, Any] = {"do_sample": True} | drawn if drawn else {}
    # transformers refuses temperature 0 and has a flag for greedy decoding instead
    if generation.temperature == 0:
        fields = {"do_sample": False}
    if generation.repetition_penalty is not None:
        fields["repetition_penalty"] = generation.repetition_penalty
    return fields


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
