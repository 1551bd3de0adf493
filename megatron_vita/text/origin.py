"""Prompt format of a published folder, as the fields of a recipe."""

import json
from pathlib import Path
from typing import Any

from megatron_vita.config import TextConfig
from megatron_vita.config.groups.text import TemplateName
from megatron_vita.errors import ConfigError
from megatron_vita.text.hugging_face import read_folder

INTERNVL_SYSTEMS = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
}
"""Default system prompts of OpenGVLab's own layout, by `template` of config.json (2.5, 3, 3.5)."""
_NESTED = ("text_config", "llm_config")


def text_of_folder(folder: Path) -> TextConfig:
    """Derive a recipe's `text` from a Hugging Face folder.

    It holds the template, the token that begins texts, and the tokens that end generation in
    transformers; tokenizer, media format and system prompt are left to the caller.

    Raises:
        ConfigError: naming the file: an end of generation is not in the vocabulary.
    """
    tokenizer = read_folder(folder, added=())
    file, ids = _ends(folder)
    names = [tokenizer.token_name(index) for index in ids]
    for index, name in zip(ids, names, strict=True):
        if name is None:
            raise ConfigError(
                f"{file}: eos_token_id {index} is not among the tokenizer's {tokenizer.vocab_size} "
                "entries"
            )
    template: TemplateName = "plain"
    if tokenizer.chat_template:
        template = "jinja"
    return TextConfig(
        template=template,
        begin_token=tokenizer.begin_token,
        stop_tokens=[name for name in names if name is not None],
    )


def _ends(folder: Path) -> tuple[Path, list[int]]:
    """File that defines the end of generation, and the ids of `eos_token_id` in it."""
    # As in transformers: generation_config.json, where there is one, replaces config.json.
    file = folder / "generation_config.json"
    if not file.exists():
        file = folder / "config.json"
    config: dict[str, Any] = {}
    if file.exists():
        config = json.loads(file.read_text())
    for values in (config, *(config.get(name) or {} for name in _NESTED)):
        ends = values.get("eos_token_id")
        if isinstance(ends, list):
            return file, ends
        if ends is not None:
            return file, [ends]
    return file, []
