"""The toy world as fixtures."""

from pathlib import Path

import pytest

from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.train import train_sentencepiece
from tests.data.toy_data import World, make_world, toy_recipe, toy_sample
from tests.once import made_once


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
    def train(folder: Path) -> None:
        texts = [turn["content"] for i in range(40) for turn in toy_sample(i)[0]["messages"]]
        train_sentencepiece(["user assistant", *texts], folder / "toy.model", vocab_size=340)

    return made_once("tokenizer", train) / "toy.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def world(tokenizer: Tokenizer) -> World:
    """A world that tests must not change: `root`, `recipe`, `tokenizer`."""
    root = made_once("world", lambda place: make_world(place, tokenizer))
    return World(root=root, recipe=toy_recipe(root), tokenizer=tokenizer)


@pytest.fixture
def own_world(tmp_path: Path, tokenizer: Tokenizer) -> World:
    """A world of the test's own, to be damaged."""
    return World(root=tmp_path, recipe=make_world(tmp_path, tokenizer), tokenizer=tokenizer)
