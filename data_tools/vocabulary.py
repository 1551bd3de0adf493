"""Trains a tokenizer on the text of samples."""

from collections.abc import Iterator
from pathlib import Path

from data_tools.lines import Line, read_lines
from data_tools.samples import parse_line
from megatron_vita.data.samples.records import check_record, is_raw_text
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.conversation import TextPart, check_messages
from megatron_vita.text.train import train_sentencepiece


def train_tokenizer(files: list[Path], *, out: Path, vocab_size: int) -> int:
    """Trains a SentencePiece model and gives the number of texts. DataError naming file and line of
    a bad one."""
    if out.suffix != ".model":
        raise ConfigError(f"--out {out}: the name must end in .model")
    texts = [text for line in read_lines(files) for text in _texts(line)]
    train_sentencepiece(texts, out, vocab_size=vocab_size)
    return len(texts)


def _texts(line: Line) -> Iterator[str]:
    try:
        sample = parse_line(line)
        check_record(sample)
        turns = [] if is_raw_text(sample) else check_messages(sample)
    except DataError as error:
        raise DataError(f"{line.file}:{line.number}: {error}") from error
    if not turns:
        yield sample["text"]
    for turn in turns:
        yield from (part.text for part in turn.parts if isinstance(part, TextPart))
