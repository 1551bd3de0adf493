"""The tokenizer of a checkpoint, which travels in its folder.

<checkpoint>/tokenizer.model   a copy of a SentencePiece model, or
<checkpoint>/tokenizer/        of the files of a Hugging Face tokenizer

A recipe names its tokenizer by a path that holds where it was trained; the copy lets a checkpoint be
used from any folder, on any machine.
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
    "config.json",  # tells transformers the class of a tokenizer
)
"""What tokenizers are made of: a folder that one is named by may also hold a model's weights."""


def copy_tokenizer(source: str | Path, checkpoint: Path) -> None:
    """Copy a tokenizer into the folder of a checkpoint. What cannot be copied is warned of: it must
    not end a run."""
    source = Path(source)
    try:
        if source.is_file():
            shutil.copyfile(source, checkpoint / FILE)
        elif source.is_dir():
            (checkpoint / FOLDER).mkdir()
            for file in sorted({file for name in _NAMES for file in source.glob(name)}):
                if file.is_file():
                    shutil.copyfile(file, checkpoint / FOLDER / file.name)
    except OSError as error:
        logger.warning("%s: the tokenizer cannot be copied into %s: %s", source, checkpoint, error)


def find_tokenizer(checkpoint: Path, recorded: str) -> str:
    """Give the place of a checkpoint's tokenizer: in its folder, or else the `recorded` one.

    Raises:
        CheckpointError: there is none in either place.
    """
    # converted weights name a place in their own folder
    inside = [checkpoint / FOLDER, checkpoint / FILE]
    if recorded and not Path(recorded).is_absolute():
        inside.insert(0, checkpoint / recorded)
    for place in (*inside, Path(recorded)):
        if place.exists():
            return str(place)
    raise CheckpointError(
        f"{checkpoint} holds no tokenizer, and {recorded!r}, where it was in training, is not to be "
        f"found from {Path.cwd()}: name it (--tokenizer)"
    )
