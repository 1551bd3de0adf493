"""A tokenizer meets an embedding: entries, rows, and the ids of requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_vita.config import LanguageConfig, ModelConfig, Recipe, TextConfig
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.vocabulary import check_ids, open_tokenizer

OWN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_bytes(folder: Path, *special: str) -> int:
    """A tokenizer of 256 bytes and some special tokens; gives its number of entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return len(alphabet) + len(special)


def recipe(folder: Path, rows: int, *, text_only: bool = False, template: Any = "chatml") -> Recipe:
    return Recipe(
        model=ModelConfig(language=LanguageConfig(vocab_size=rows), text_only=text_only),
        text=TextConfig(tokenizer=str(folder), template=template),
    )


def test_more_entries_than_rows_are_refused_with_both_numbers(tmp_path: Path) -> None:
    entries = save_bytes(tmp_path, *OWN)
    with pytest.raises(ConfigError, match=rf"vocab_size is 200, but .* has {entries} entries$"):
        open_tokenizer(recipe(tmp_path, 200, text_only=True))


def test_the_refusal_names_the_tokens_that_are_appended(tmp_path: Path) -> None:
    entries = save_bytes(tmp_path)
    with pytest.raises(
        ConfigError,
        match=rf"has {entries + 2} entries, of which 2 are appended .*<\|im_start\|>, <\|im_end\|>",
    ):
        open_tokenizer(recipe(tmp_path, entries, text_only=True))


@pytest.mark.parametrize(
    ("text_only", "template", "media_format", "appended"),
    [
        (True, "chatml", "long_vita", 2),
        (True, "plain", "long_vita", 0),
        (False, "chatml", "long_vita", 19),
        (False, "plain", "long_vita", 17),
        (False, "chatml", "internvl", 5),
        (False, "plain", "internvl", 3),
    ],
)
def test_only_tokens_that_prompts_need_are_appended(
    tmp_path: Path, text_only: bool, template: str, media_format: str, appended: int
) -> None:
    entries = save_bytes(tmp_path, "</s>")
    asked = recipe(tmp_path, entries + appended, text_only=text_only, template=template)
    asked = asked.replaced({"text.media_format": media_format})
    tokenizer = open_tokenizer(asked)
    assert tokenizer.vocab_size == entries + appended
    assert len(tokenizer.appended) == appended


def test_a_tokenizer_that_has_all_tokens_gets_none(tmp_path: Path) -> None:
    entries = save_bytes(tmp_path, *OWN)
    tokenizer = open_tokenizer(recipe(tmp_path, entries, text_only=True))
    assert (tokenizer.vocab_size, tokenizer.appended) == (entries, ())


def test_a_recipe_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.tokenizer is empty"):
        open_tokenizer(Recipe())


def test_ids_beyond_the_embedding_are_refused() -> None:
    check_ids(np.array([0, 9]), rows=10)
    check_ids([], rows=10)
    with pytest.raises(DataError, match="token 10, but the model's embedding 10 rows"):
        check_ids(np.array([3, 10]), rows=10)
    with pytest.raises(DataError, match="token -1"):
        check_ids([-1], rows=10)
