"""What a folder says of its prompts, and the special tokens that its tokenizer lacks for them."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vita.config import TextConfig
from megatron_vita.convert.config_file import Config
from megatron_vita.convert.families.folder_formats import (
    INTERNVL_CHAT,
    INTERNVL_HF,
    LONG_VITA,
    FolderFormat,
)
from megatron_vita.convert.sidecar_files import has_tokenizer
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.text.origin import INTERNVL_SYSTEMS, text_of_folder
from megatron_vita.text.tokenizer import Tokenizer, load_tokenizer
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
    """How a model is asked; without a tokenizer nothing is known of it."""

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    tokenizer: Tokenizer | None = None

    @property
    def entries(self) -> int:
        """Rows that the word embedding must have at least."""
        if self.tokenizer is None:
            return 0
        return self.tokenizer.vocab_size

    @property
    def appended(self) -> Sequence[str]:
        """Special tokens that the folder's own tokenizer lacks, in the order of their ids."""
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
    """What a source says of prompts.

    write_sidecar_files: writes its files into a folder. with_media: the media format of a model that
    is put together from it; "" where it stays a language model. CheckpointError, naming the field,
    for a form of prompts that is not known.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sidecar_files(folder)
        if not has_tokenizer(folder):
            return Prompts()
        try:
            text = _text_of(folder_format, config, folder)
            if with_media:
                text = dataclasses.replace(text, media_format=with_media)
            needed = tokens_needed(text, text_only=not with_media and len(folder_format.parts) == 1)
            return Prompts(text=text, tokenizer=load_tokenizer(folder, added=needed))
        except ConfigError as error:
            raise CheckpointError(str(error).replace(temporary, config.where)) from error


def _text_of(folder_format: FolderFormat, config: Config, folder: Path) -> TextConfig:
    text = text_of_folder(folder)
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
    """CheckpointError unless image_token_id of transformers' InternVL is the tokenizer's."""
    said = config.get("image_token_id")
    found = tokenizer.special_id(CONTEXT)
    if said is not None and said != found:
        raise config.wrong("image_token_id", f"the tokenizer has {CONTEXT} at {found}")


def append_tokens(folder: Path, tokenizer: Tokenizer, *, names: dict[str, str]) -> None:
    """Write the special tokens that `tokenizer` appends into the tokenizer files of a folder, and
    what transformers' processors call some of them.

    CheckpointError if transformers would give them other ids.
    """
    from transformers import AddedToken, AutoTokenizer

    known = {kind: name for kind, name in names.items() if name in tokenizer.special_names}
    theirs = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, **({"extra_special_tokens": known} if known else {})
    )
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
