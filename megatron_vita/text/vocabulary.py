"""The one place where a tokenizer meets the embedding of a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vita.config import Recipe, TextConfig
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from megatron_vita.text.template import TEMPLATES
from megatron_vita.text.tokenizer import Tokenizer, load_tokenizer


def tokens_needed(text: TextConfig, *, text_only: bool) -> tuple[str, ...]:
    """Special tokens that prompts of a recipe are made of, in the order in which they are appended
    to a tokenizer that lacks them."""
    media = () if text_only else MEDIA_FORMATS[text.media_format].special_tokens
    # a tokenizer has all that its own template writes
    template = TEMPLATES[text.template].special_tokens if text.template in TEMPLATES else ()
    return (*media, *template)


def open_tokenizer(recipe: Recipe, *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a recipe, with the special tokens that its prompts need.

    `folder` is where it lies, if not where the recipe says. Training, serving, evaluation and the
    data tools all come by here.

    Raises:
        ConfigError: the recipe names no tokenizer, it cannot be read, has more entries than the
            model's embedding has rows, or lacks what the recipe's prompts are made of.
    """
    path = folder or recipe.text.tokenizer
    if not path:
        raise ConfigError(
            "text.tokenizer is empty: name a tokenizer folder or a SentencePiece .model file"
        )
    added = tokens_needed(recipe.text, text_only=recipe.model.text_only)
    tokenizer = load_tokenizer(path, added=added)
    check_vocabulary(tokenizer, rows=recipe.model.language.vocab_size, name=str(path))
    ChatFormat(tokenizer, recipe.text).check()
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, *, rows: int, name: str) -> None:
    """ConfigError unless an embedding of `rows` has a row for every entry of the tokenizer
    `name`."""
    if tokenizer.vocab_size <= rows:
        return
    if tokenizer.appended:
        appended = (
            f", of which {len(tokenizer.appended)} are appended for prompts and media "
            f"({', '.join(tokenizer.appended)})"
        )
    else:
        appended = ""
    raise ConfigError(
        f"model.language.vocab_size is {rows}, but the tokenizer {name} has "
        f"{tokenizer.vocab_size} entries{appended}"
    )


def check_ids(ids: np.ndarray | Sequence[int], *, rows: int) -> None:
    """DataError if a token id is beyond the `rows` of an embedding."""
    if not len(ids):
        return
    lowest = int(np.min(ids))
    highest = int(np.max(ids))
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"the prompt has token {wrong}, but the model's embedding {rows} rows")
