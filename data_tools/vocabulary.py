"""Training of a tokenizer on the text of samples."""

from pathlib import Path
from typing import NamedTuple

from data_tools.reading.lines import Line, read_lines
from data_tools.reading.samples import read_sample
from megatron_vita.data.samples.records import is_raw_text
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.files import write_json_lines
from megatron_vita.text.conversation import TextPart, check_messages
from megatron_vita.text.train import train_sentencepiece


class Training(NamedTuple):
    """Numbers of texts that a tokenizer was trained on, and of rejected lines."""

    texts: int
    rejected: int


def train_tokenizer(files: list[Path], *, out: Path, vocab_size: int) -> Training:
    """Train a SentencePiece model; rejected lines are listed beside it with their reasons.

    Raises:
        ConfigError: `out` has another suffix, or the size does not fit the text.
        DataError: a file cannot be read, or all lines are bad.
    """
    if out.suffix != ".model":
        raise ConfigError(f"--out {out}: the name must end in .model")
    texts: list[str] = []
    rejected = []
    for line in read_lines(files):
        try:
            texts += _texts(line)
        except DataError as error:
            rejected.append({"file": str(line.file), "line": line.number, "reason": str(error)})
    if rejected and not texts:
        raise DataError("{file}:{line}: {reason}; no line is good".format(**rejected[0]))
    train_sentencepiece(texts, out, vocab_size=vocab_size)
    if rejected:
        write_json_lines(rejected_path(out), rejected)
    else:
        # The list of an earlier training must not remain.
        rejected_path(out).unlink(missing_ok=True)
    return Training(len(texts), len(rejected))


def rejected_path(out: Path) -> Path:
    """Path of the list of rejected lines."""
    return out.with_suffix(".rejected.jsonl")


def _texts(line: Line) -> list[str]:
    sample = read_sample(line)
    if is_raw_text(sample):
        return [sample["text"]]
    parts = [part for turn in check_messages(sample) for part in turn.parts]
    return [part.text for part in parts if isinstance(part, TextPart)]
