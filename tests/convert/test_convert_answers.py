"""Converted models answer through our engine as they do in transformers, wherever the checkpoint
lies."""

from pathlib import Path

import pytest

from megatron_vita.convert.importing import import_weights
from megatron_vita.inference.engine.engine import Engine
from tests.convert.answers_of_transformers import assert_same_answer
from tests.convert.toy_folders import model_of, save


@pytest.mark.parametrize("family", ["qwen2", "qwen3-yarn", "llama-llama3"])
def test_greedy_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = model_of(family).eval()
    import_weights([save(model, tmp_path / "theirs")], tmp_path / "ours", projector="internvl")
    moved = (tmp_path / "ours").rename(tmp_path / "moved")
    engine = Engine.from_checkpoint(moved)
    assert_same_answer(engine, model, "abba ab a", max_new_tokens=12, ignore_eos=True)
