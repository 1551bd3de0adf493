"""A checkpoint is used from any folder: its tokenizer lies in it."""

import dataclasses
import logging
from pathlib import Path

import pytest

from megatron_vita import platform
from megatron_vita.checkpoint import store
from megatron_vita.checkpoint.tokenizer_copy import copy_tokenizer, find_tokenizer
from megatron_vita.errors import CheckpointError
from megatron_vita.inference.engine.engine import Engine
from tests.inference.tiny import tiny_engine, tiny_recipe


def test_a_checkpoint_answers_elsewhere_and_without_the_folder_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.initialize_process()
    monkeypatch.chdir(tmp_path)
    folder = Path("training")
    folder.mkdir()
    recipe = tiny_recipe(folder)
    assert not Path(recipe.text.tokenizer).is_absolute()
    checkpoint = store.save_checkpoint(
        "checkpoints",
        step=1,
        state={"model": store.model_state([tiny_engine(folder).model])},
        manifest={"recipe": dataclasses.asdict(recipe)},
        keep=1,
        tokenizer=recipe.text.tokenizer,
    ).absolute()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / recipe.text.tokenizer).unlink()
    assert Engine.from_checkpoint(checkpoint).tokenizer.encode("a red circle")


def test_of_a_folder_only_what_makes_a_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "model"
    checkpoint = tmp_path / "checkpoint"
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"]
    names += ["vocab.json", "special_tokens_map.json", "spiece.model", "config.json"]
    source.mkdir()
    checkpoint.mkdir()
    for name in [*names, "model.safetensors", "README.md", "generation_config.json"]:
        (source / name).write_text(name)
    copy_tokenizer(source, checkpoint)
    copied = checkpoint / "tokenizer"
    assert sorted(file.name for file in copied.iterdir()) == sorted(names)
    assert find_tokenizer(checkpoint, str(source)) == str(copied)


def test_converted_weights_keep_the_place_that_they_name(tmp_path: Path) -> None:
    (tmp_path / "hugging_face" / "qwen2").mkdir(parents=True)
    place = tmp_path / "hugging_face" / "qwen2"
    assert find_tokenizer(tmp_path, "hugging_face/qwen2") == str(place)


def test_without_a_copy_the_place_of_training_is_taken_while_it_is_there(tmp_path: Path) -> None:
    recorded = tmp_path / "x.model"
    recorded.touch()
    assert find_tokenizer(tmp_path / "checkpoint", str(recorded)) == str(recorded)
    recorded.unlink()
    with pytest.raises(CheckpointError, match=r"x\.model.*--tokenizer"):
        find_tokenizer(tmp_path / "checkpoint", str(recorded))


def test_a_tokenizer_that_is_gone_does_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "source").mkdir()
    with caplog.at_level(logging.WARNING):
        copy_tokenizer(tmp_path / "source", tmp_path)
    assert "the tokenizer cannot be copied" in caplog.text
