"""Tokenizers from their files."""

from collections.abc import Sequence
from pathlib import Path

from megatron_vita.errors import ConfigError
from megatron_vita.text.tokenizer_base import SPECIAL_TOKENS, Tokenizer


def load_tokenizer(path: str | Path, *, added: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Read a Hugging Face tokenizer folder or a SentencePiece `.model` file, without downloads.

    Special tokens of `added` that are missing get the ids after the last one, in order (for
    Qwen2.5: 151665 and on).

    Raises:
        ConfigError: there is no such tokenizer, it inserts spaces between texts encoded one by one,
            or it is a SentencePiece model that loses line breaks.
    """
    # The two libraries are imported where they are needed: each takes long to load.
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder: a Hugging Face tokenizer folder or a SentencePiece .model file is needed"
        )
    if path.is_dir():
        from megatron_vita.text.hugging_face import read_folder

        tokenizer: Tokenizer = read_folder(path, added=added)
    elif path.suffix == ".model" and path.is_file():
        from megatron_vita.text.sentence_piece import read_model

        tokenizer = read_model(path, added=added)
    else:
        raise ConfigError(
            f"{path} is neither a Hugging Face tokenizer folder nor a SentencePiece .model file"
        )
    # Converted SentencePiece tokenizers may put a space before each text that they encode.
    joined = tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b"))
    if joined == "a b":
        raise ConfigError(
            f"{path}: this tokenizer puts a space before every text ('a' and 'b' decode to "
            f"{joined!r}), so that turns cannot be encoded one by one; use its SentencePiece "
            ".model file instead"
        )
    return tokenizer
