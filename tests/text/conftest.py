"""A tokenizer small enough to train in a moment."""

from pathlib import Path

import pytest

from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.train import train_sentencepiece


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("small") / "small.model"
    train_sentencepiece(
        ["the quick brown fox jumps over the lazy dog 0123456789"] * 20, path, vocab_size=320
    )
    return load_tokenizer(path)
