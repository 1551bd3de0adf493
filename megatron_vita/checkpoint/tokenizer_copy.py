"""The copy of the tokenizer inside a checkpoint.

    <checkpoint>/tokenizer.model   copy of a SentencePiece model, or
    <checkpoint>/tokenizer/        copies of the files of a Hugging Face tokenizer

A recipe's path to its tokenizer is valid only where the model was trained; the copy makes a
checkpoint usable from any folder on any machine.
"""

import logging
import shutil
from pathlib import Path

from megatron_vita.errors import CheckpointError

logger = logging.getLogger(__name__)

FOLDER = "tokenizer"
FILE = "tokenizer.model"
_NAMES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "config.json",  # names the tokenizer's class for transformers
)
"""Files of a tokenizer: the folder given as tokenizer may also hold a model's weights."""


def copy_tokenizer(source: str | Path, checkpoint: Path) -> None:
    """Copy a tokenizer into a checkpoint; log a warning if that fails, as it must not end a run."""
    source = Path(source)
    try:
        if source.is_file():
            shutil.copyfile(source, checkpoint / FILE)
        elif source.is_dir():
            (checkpoint / FOLDER).mkdir()
            for file in tokenizer_files(source):
                shutil.copyfile(file, checkpoint / FOLDER / file.name)
    except OSError as error:
        logger.warning("%s: the tokenizer cannot be copied into %s: %s", source, checkpoint, error)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to a Hugging Face tokenizer."""
    found = {file for name in _NAMES for file in folder.glob(name) if file.is_file()}
    return sorted(found)


def find_tokenizer(checkpoint: Path, recorded: str) -> str:
    """Return the path of a checkpoint's tokenizer: inside it, or else the `recorded` path.

    Raises:
        CheckpointError: there is none in either place.
    """
    # Converted weights record a path relative to their own folder.
    inside = [checkpoint / FOLDER, checkpoint / FILE]
    if recorded and not Path(recorded).is_absolute():
        inside.insert(0, checkpoint / recorded)
    for path in (*inside, Path(recorded)):
        if path.exists():
            return str(path)
    raise CheckpointError(
        f"{checkpoint} holds no tokenizer, and {recorded!r}, its path in training, does not exist "
        f"as seen from {Path.cwd()}: give its path (--tokenizer)"
    )
