"""A tokenizer small enough to train in a moment, and those of published families."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vita.config import TextConfig
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.train import train_sentencepiece
from tests.text.published import FAMILIES, INTERNVL_SYSTEM, save_family
from tests.text.published_chat import DATE, Published


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("small") / "small.model"
    train_sentencepiece(
        ["the quick brown fox jumps over the lazy dog 0123456789"] * 20, path, vocab_size=320
    )
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    made: dict[str, Published] = {}

    def make(name: str) -> Published:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = save_family(folder, name)
            text = TextConfig(
                template="jinja",
                media_format="internvl",
                date=DATE,
                system=INTERNVL_SYSTEM if name == "internvl-chat" else "",
                stop_tokens=list(FAMILIES[name].generation_eos),
            )
            made[name] = Published(name, theirs, ChatFormat(load_tokenizer(folder, added=()), text))
        return made[name]

    return make
