"""Prompt format of a folder, and the special tokens that its tokenizer lacks for it."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vita.config import TextConfig, replaced
from megatron_vita.convert.families.config_file import Config
from megatron_vita.convert.families.folder_formats import (
    INTERNVL_CHAT,
    INTERNVL_HF,
    LONG_VITA,
    FolderFormat,
)
from megatron_vita.convert.settings.export_code import has_our_code, media_token_ids
from megatron_vita.convert.settings.sidecar_files import has_tokenizer
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.text.hugging_face import transformers_tokenizer
from megatron_vita.text.origin import INTERNVL_SYSTEMS, text_of_folder
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.vocabulary import tokens_needed

CONTEXT = "<IMG_CONTEXT>"
NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": CONTEXT,
    "video_token": "<video>",
}
"""Special tokens by the names under which transformers' processor for InternVL asks for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompt format and tokenizer of a model; the defaults stand for a folder without a tokenizer."""

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    tokenizer: Tokenizer | None = None

    @property
    def entries(self) -> int:
        """Number of rows that the word embedding needs at least."""
        if self.tokenizer is None:
            return 0
        return self.tokenizer.vocab_size

    @property
    def appended(self) -> Sequence[str]:
        """Special tokens missing in the folder's own tokenizer, in the order of their ids."""
        if self.tokenizer is None:
            return ()
        return self.tokenizer.appended


def read_prompts(
    folder_format: FolderFormat,
    config: Config,
    *,
    write_sidecar_files: Callable[[Path], None],
    with_media: str,
) -> Prompts:
    """Read the prompt format of a source.

    Args:
        write_sidecar_files: writes the source's files into a folder.
        with_media: media format for a language model that gets a vision tower; otherwise "".

    Raises:
        CheckpointError: the prompt format is unknown; the message names the field.
    """
    # A copy, because a GGUF file has no tokenizer files until they are written.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sidecar_files(folder)
        if not has_tokenizer(folder):
            return Prompts()
        try:
            text = _text_of(folder_format, config, folder)
            if with_media:
                text = replaced(text, {"media_format": with_media})
            needed = tokens_needed(text, text_only=not with_media and len(folder_format.parts) == 1)
            return Prompts(text=text, tokenizer=load_tokenizer(folder, added=needed))
        except ConfigError as error:
            # The temporary folder's name would tell the user nothing.
            raise CheckpointError(str(error).replace(temporary, config.where)) from error


def _text_of(folder_format: FolderFormat, config: Config, folder: Path) -> TextConfig:
    text = text_of_folder(folder)
    # Our own exports carry the template of their prompts.
    if folder_format is LONG_VITA and has_our_code(config.values):
        return dataclasses.replace(text, media_format="long_vita")
    if folder_format is LONG_VITA:  # trained without the default system turn of Qwen's template
        return dataclasses.replace(text, template="chatml", media_format="long_vita")
    if folder_format is INTERNVL_HF:
        return dataclasses.replace(text, media_format="internvl")
    if folder_format is INTERNVL_CHAT:
        name = config.must_be("template", tuple(INTERNVL_SYSTEMS), None)
        system = config.get("system_message") or INTERNVL_SYSTEMS[name]
        return dataclasses.replace(text, media_format="internvl", system=system)
    return text


def check_image_token(config: Config, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError unless `image_token_id` in an `internvl-hf` config is the tokenizer's
    id."""
    said = config.get("image_token_id")
    found = tokenizer.special_id(CONTEXT)
    if said is not None and said != found:
        raise config.wrong("image_token_id", f"the tokenizer has {CONTEXT} at {found}")


def check_media_tokens(config: Config, prompts: Prompts) -> None:
    """Raise CheckpointError unless `media_token_ids` of one of our exports are the tokenizer's."""
    assert prompts.tokenizer is not None
    said = config.get("media_token_ids")
    found = media_token_ids(prompts.tokenizer)
    if said != found:
        raise config.wrong("media_token_ids", f"the tokenizer has the placeholders at {found}")


def append_tokens(folder: Path, tokenizer: Tokenizer, *, names: dict[str, str]) -> None:
    """Write the special tokens that `tokenizer` appends into a folder's tokenizer files.

    Args:
        names: special tokens by the names under which transformers' processors look them up.

    Raises:
        CheckpointError: transformers would give the tokens other ids.
    """
    from transformers import AddedToken

    known = {kind: name for kind, name in names.items() if name in tokenizer.special_names}
    # Changed and saved by transformers itself, whose files differ between its versions.
    theirs = transformers_tokenizer(folder, **({"extra_special_tokens": known} if known else {}))
    theirs.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in tokenizer.appended],
        special_tokens=True,
    )
    for name in tokenizer.appended:
        found = theirs.convert_tokens_to_ids(name)
        wanted = tokenizer.special_id(name)
        if found != wanted:
            raise CheckpointError(
                f"{folder}: transformers gives {name} the id {found}, but {wanted} was trained"
            )
    theirs.save_pretrained(folder)
    if len(known) < len(names):
        # `<video>`, which the processor looks up and replaces: it needs an id, but no row
        transformers_tokenizer(folder, extra_special_tokens=names).save_pretrained(folder)
