"""Match of a tokenizer with the embedding of a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_vita.config import Recipe, TextConfig
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.media_tokens import MEDIA_FORMATS
from megatron_vita.text.template import TEMPLATES
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer


def tokens_needed(text: TextConfig, *, text_only: bool) -> tuple[str, ...]:
    """Special tokens of a recipe's prompts, in the order in which missing ones are appended."""
    needed: list[str] = []
    if not text_only:
        needed += MEDIA_FORMATS[text.media_format].special_tokens
    # A tokenizer with a template of its own has the tokens of that template.
    if text.template in TEMPLATES:
        needed += TEMPLATES[text.template].special_tokens
    return tuple(needed)


def open_tokenizer(recipe: Recipe, *, folder: Path | None = None) -> Tokenizer:
    """Load the tokenizer of a recipe, with the special tokens that its prompts need.

    Training, serving, evaluation and the data tools all use this function.

    Args:
        recipe: the recipe.
        folder: the tokenizer's folder or file, instead of `text.tokenizer`.

    Raises:
        ConfigError: the recipe names no tokenizer, or it cannot be read, has more entries than the
            model's embedding has rows, or lacks tokens or the template of the recipe's prompts.
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
    """Raise ConfigError if the tokenizer `name` has more entries than an embedding of `rows`."""
    if tokenizer.vocab_size <= rows:
        return
    appended = ""
    if tokenizer.appended:
        appended = (
            f", of which {len(tokenizer.appended)} are appended for prompts and media "
            f"({', '.join(tokenizer.appended)})"
        )
    raise ConfigError(
        f"model.language.vocab_size is {rows}, but the tokenizer {name} has "
        f"{tokenizer.vocab_size} entries{appended}"
    )


def check_ids(ids: np.ndarray | Sequence[int], *, rows: int) -> None:
    """Raise DataError if a token id is outside an embedding of `rows`."""
    if not len(ids):
        return
    lowest = int(np.min(ids))
    highest = int(np.max(ids))
    for token in (lowest, highest):
        if not 0 <= token < rows:
            raise DataError(f"the prompt has token {token}, but the model's embedding {rows} rows")
