"""The toy world as fixtures."""

from pathlib import Path

import pytest

from megatron_vita.text.load import load_tokenizer
from megatron_vita.text.tokenizer import Tokenizer
from megatron_vita.text.train import train_sentencepiece
from tests.data.toy_data import World, make_world, toy_sample


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "toy.model"
    texts = [turn["content"] for i in range(40) for turn in toy_sample(i)[0]["messages"]]
    train_sentencepiece(["user assistant", *texts], path, vocab_size=340)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    """A world that tests must not change: `root`, `recipe`, `tokenizer`."""
    root = tmp_path_factory.mktemp("world")
    return World(root=root, recipe=make_world(root, tokenizer), tokenizer=tokenizer)


@pytest.fixture
def own_world(tmp_path: Path, tokenizer: Tokenizer) -> World:
    """A world of the test's own, to be damaged."""
    return World(root=tmp_path, recipe=make_world(tmp_path, tokenizer), tokenizer=tokenizer)
