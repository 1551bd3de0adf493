"""Messages on the page of troubleshooting are those that the code gives."""

import functools
import re
from pathlib import Path

import pytest

from megatron_vita.config import Recipe
from megatron_vita.errors import CheckpointError, ConfigError
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.training.run.resume import FIXED, check_parts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADS = re.findall(r"^\*\*(.*?)\*\*", PAGE, re.MULTILINE)
MESSAGES = [message for head in HEADS for message in re.findall(r"`([^`]+)`", head)]
THEIRS = {
    "torch.OutOfMemoryError", "CUDA out of memory", "unable to open shared memory object",
    "Bus error", "DistNetworkError ... EADDRINUSE", "undefined symbol",
    "cannot import transformer_engine_torch", "CUDA driver version is insufficient",
    "cuDNN ... No valid execution plans", "CUDNN_STATUS_NOT_SUPPORTED",
    "NCCL error: unhandled system error", "Connection closed by remote peer", "NCCL ... multicast",
}  # fmt: skip
"""Messages of torch, CUDA, cuDNN and NCCL."""
VALUES = re.compile(r"\.\.\.|\bnan\b|SIGKILL|WORLD_SIZE|\b[AB]\b")
"""Parts of messages that are values."""


JOINT = re.compile(r'"\s*\n\s*f?"')
"""Between the lines of one string in the code."""


@functools.cache
def texts_of_files() -> list[str]:
    """The code of each file, with strings over several lines in one."""
    folders = ("megatron_vita", "data_tools")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [JOINT.sub("", file.read_text(encoding="utf-8")) for file in files]


def is_written(message: str) -> bool:
    """Tell whether one file has all parts of a message between its values."""
    parts = [part.strip(" ,:") for part in VALUES.split(message)]
    parts = [part for part in parts if part]
    return any(all(part in text for part in parts) for text in texts_of_files())


@pytest.mark.parametrize("message", sorted(set(MESSAGES) - THEIRS))
def test_messages_that_the_page_explains_are_in_the_code(message: str) -> None:
    assert is_written(message)


def test_messages_of_others_are_on_the_page_and_not_in_the_code() -> None:
    assert set(MESSAGES) >= THEIRS
    assert not is_written("no file says this")


def test_a_file_that_is_no_tokenizer_is_refused_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a b")
    said = "neither a Hugging Face tokenizer folder nor a SentencePiece .model file"
    assert said in PAGE
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_tokenizer(tmp_path / "words.txt")


@pytest.mark.parametrize("field", ["training.bf16", "training.freeze_projector", "model.text_only"])
def test_a_field_that_a_run_cannot_change_is_named_as_the_page_says(field: str) -> None:
    recipe = Recipe()
    value = functools.reduce(getattr, field.split("."), recipe)
    assert field in FIXED
    said = "in the run to be resumed, which it cannot change in"
    assert said in PAGE
    with pytest.raises(CheckpointError, match=f"{field} is {not value}, but {value} {said}"):
        check_parts(recipe, recipe.replaced({field: not value}))
