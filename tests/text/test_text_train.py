"""Training of SentencePiece models."""

import random
import re
from pathlib import Path

import pytest
import sentencepiece

from megatron_vita.errors import DataError
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.train import train_sentencepiece

SENTENCE = "what is the shape colour of this picture red blue circle triangle yes no there a does contain 1234"
WORDS = SENTENCE.split()


def corpus(lines: int = 200) -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=8)) + "\n  next  line" for _ in range(lines)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_trained_model_has_the_size_asked_for_and_gives_text_back(
    tmp_path: Path, model_type: str
) -> None:
    path = tmp_path / "folder" / "small.model"
    train_sentencepiece(corpus(), path, vocab_size=330, model_type=model_type)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 330
    for text in ("is this  red?\n\n no ", "\n", "  ", "Ünseen 漢字 <image>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_of_the_corpus_become_few_tokens_and_digits_stay_single(tmp_path: Path) -> None:
    train_sentencepiece(corpus(), tmp_path / "small.model", vocab_size=370)
    tokenizer = load_tokenizer(tmp_path / "small.model")
    assert len(tokenizer.encode(" triangle")) == 1
    assert len(tokenizer.encode("1234")) == 4


def test_the_same_lines_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.model", "two.model"):
        train_sentencepiece(iter(corpus()), tmp_path / name, vocab_size=330)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


def test_very_long_lines_are_not_skipped(tmp_path: Path) -> None:
    line = " ".join(random.Random(0).choices(WORDS, k=2000))
    train_sentencepiece([line], tmp_path / "small.model", vocab_size=350)
    assert load_tokenizer(tmp_path / "small.model").vocab_size == 350


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("wrong_size", [10, 9999])
def test_an_impossible_size_is_refused_with_the_nearest_that_works(
    tmp_path: Path, model_type: str, wrong_size: int
) -> None:
    path = tmp_path / "small.model"
    with pytest.raises(DataError, match=f"vocab_size {wrong_size} is too") as caught:
        train_sentencepiece(corpus(), path, vocab_size=wrong_size, model_type=model_type)
    assert not path.exists()
    nearest = int(re.findall(r"\d+", str(caught.value))[-1])
    train_sentencepiece(corpus(), path, vocab_size=nearest, model_type=model_type)
    assert load_tokenizer(path).vocab_size == nearest


@pytest.mark.parametrize("lines", [[], ["", "\n\n"]])
def test_no_text_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(lines, tmp_path / "small.model", vocab_size=300)


def test_a_line_break_is_one_token_though_the_corpus_has_many_in_a_row(tmp_path: Path) -> None:
    train_sentencepiece(
        ["yes\n\nno\n\n"] * 200 + corpus(), tmp_path / "small.model", vocab_size=340
    )
    tokenizer = load_tokenizer(tmp_path / "small.model")
    assert tokenizer.encode("\n\n") == tokenizer.encode("\n") * 2


def test_the_model_file_keeps_spaces_for_other_readers_too(tmp_path: Path) -> None:
    train_sentencepiece(corpus(), tmp_path / "small.model", vocab_size=340)
    reader = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    assert reader.decode(reader.encode("  red  blue ")) == "  red  blue "
