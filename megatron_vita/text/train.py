"""Training of SentencePiece models."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from megatron_vita.errors import DataError
from megatron_vita.files import atomic_write
from megatron_vita.text.tokenizer_base import SPECIAL_TOKENS


def train_sentencepiece(
    lines: Iterable[str], model_path: str | Path, *, vocab_size: int, model_type: str = "bpe"
) -> None:
    """Train a model of `vocab_size` pieces ("bpe" or "unigram") on `lines`; write it to
    `model_path`.

    Decoding restores text exactly, line breaks and runs of spaces included, except that U+2581
    becomes a space (it is SentencePiece's own mark of one). Digits are single pieces, a line break
    is one token, and characters without a piece become bytes. The special tokens are control
    symbols. The same lines give the same bytes.

    Raises:
        DataError: there is no text, or `vocab_size` does not suit it; the message names one that
            does.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_single_lines(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            control_symbols=list(SPECIAL_TOKENS),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,
            # One thread, so that the same lines give the same bytes.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from error
    model_path = Path(model_path)
    model_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(model_path) as partial:
        partial.write_bytes(model.getvalue())


def _single_lines(lines: Iterable[str]) -> Iterator[str]:
    """Split texts at line breaks, so that no piece holds one."""
    for text in lines:
        yield from filter(None, text.split("\n"))


def _explained(message: str, vocab_size: int) -> DataError:
    if "sentences_.empty()" in message:
        return DataError("there is no text to train a tokenizer on")
    if high := re.search(r"size too high .* <= (\d+)", message):
        return DataError(
            f"vocab_size {vocab_size} is too large for this little text: at most {high[1]} works"
        )
    if low := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return DataError(
            f"vocab_size {vocab_size} is too small: the special tokens, 256 bytes and the "
            f"characters of this text take {low[1]}, so more than that is needed"
        )
    return DataError(f"training a tokenizer of vocab_size {vocab_size} failed: {message}")
