"""What a published folder says of its prompts, as the fields of a recipe."""

import json
from pathlib import Path
from typing import Any

from megatron_vita.config import TextConfig
from megatron_vita.errors import ConfigError
from megatron_vita.text.hugging_face import read_folder

INTERNVL_SYSTEMS = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，"  # noqa: RUF001
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    )
}
"""Default system turns of OpenGVLab's own layout, by `template` of its config.json (2.5, 3 and 3.5)."""
_NESTED = ("text_config", "llm_config")


def text_of_folder(folder: Path) -> TextConfig:
    """The recipe's `text` for a Hugging Face folder, but for the place of the tokenizer and the
    media format: the chat template, where it has one, the token that begins texts, and those that
    end what transformers generates.

    ConfigError, naming the file, for an end that is no token of the tokenizer.
    """
    tokenizer = read_folder(folder, added=())
    file, ids = _ends(folder)
    names = [tokenizer.token_name(index) for index in ids]
    for index, name in zip(ids, names, strict=True):
        if name is None:
            raise ConfigError(
                f"{file}: eos_token_id {index} is none of the tokenizer's {tokenizer.vocab_size} entries"
            )
    return TextConfig(
        template="jinja" if tokenizer.chat_template else "plain",
        begin_token=tokenizer.begin_token,
        stop_tokens=[name for name in names if name is not None],
    )


def _ends(folder: Path) -> tuple[Path, list[int]]:
    """The file that says where generation ends, and the ids of `eos_token_id` in it."""
    file = folder / "generation_config.json"
    if not file.exists():
        file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for values in (config, *(config.get(name) or {} for name in _NESTED)):
        ends = values.get("eos_token_id")
        if ends is not None:
            return file, ends if isinstance(ends, list) else [ends]
    return file, []
