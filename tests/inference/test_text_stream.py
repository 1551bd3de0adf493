"""Streamed text is the whole answer's text, whatever the tokens and however they fall."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_vita.inference.generation.detokenizer import TextStream
from megatron_vita.text.hugging_face import HuggingFaceTokenizer
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.train import train_sentencepiece

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs 0123456789",
] * 20
TEXTS = [
    " leading spaces,  two  of them\n\tand tabs \n",
    "日本語 é ☃ and 𝄞😀😀 at once",
    "\N{REPLACEMENT CHARACTER} stands in texts, too \N{REPLACEMENT CHARACTER}",
    "漢字は長い" * 20,
    "e\u0301 and \u200bzero width",
]


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CORPUS, "日本語 日曜日 😀" * 20], trainer)
    return HuggingFaceTokenizer(backend.to_str())


def byte_fallback() -> Tokenizer:
    """A tokenizer of Gemma's kind: spaces are a letter, and byte-fallback tokens decode all
    together."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁thequickbrownfox日") + ["▁t", "he"]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("h", "e")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return HuggingFaceTokenizer(backend.to_str())


def stripping() -> Tokenizer:
    """A tokenizer whose decoder strips a leading space."""
    vocabulary = {piece: place for place, piece in enumerate(["▁", "a", "b", "▁a", "▁b"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")]))
    backend.decoder = decoders.Metaspace()
    return HuggingFaceTokenizer(backend.to_str())


@pytest.fixture(scope="module")
def every_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    path: Path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    train_sentencepiece(CORPUS, path, vocab_size=340)
    return {
        "byte_level": byte_level(),
        "byte_fallback": byte_fallback(),
        "sentencepiece": load_tokenizer(path),
        "stripping": stripping(),
    }


@pytest.fixture(params=["byte_level", "byte_fallback", "sentencepiece", "stripping"])
def tokenizer(request: pytest.FixtureRequest, every_tokenizer: dict[str, Tokenizer]) -> Tokenizer:
    return every_tokenizer[request.param]


def streamed(
    tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    parts = []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream.stopped


def random_ids(generator: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Any tokens; runs of byte-fallback tokens stay below what a stream waits for."""
    ids: list[int] = []
    run = 0
    for _ in range(generator.randrange(60)):
        token = generator.randrange(tokenizer.vocab_size)
        if token not in tokenizer.special_ids:
            run = run + 1 if token in tokenizer.byte_ids else 0
        if run < 15:
            ids.append(token)
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids)


def test_random_tokens_give_the_text_of_all_of_them(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(1000):
        ids = random_ids(generator, tokenizer)
        assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids), ids


def test_bytes_that_are_no_text_come_as_all_of_them_decode(
    every_tokenizer: dict[str, Tokenizer],
) -> None:
    """Long runs of the bytes that begin and continue characters, as tokens of one byte."""
    generator = random.Random(0)
    for name in ("byte_level", "sentencepiece"):
        tokenizer = every_tokenizer[name]
        by_byte = {tokenizer.decode([token]): token for token in range(tokenizer.vocab_size)}
        undecodable = [
            token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]) == "\ufffd"
        ]
        assert len(undecodable) >= 100
        for _ in range(300):
            ids = [*generator.choices(undecodable, k=generator.randrange(80)), by_byte["a"]]
            assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids), ids


def test_no_part_ends_within_a_character(tokenizer: Tokenizer) -> None:
    text = "日本語 é ☃ and 𝄞😀" + "漢字は長い" * 20
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) == text:
        assert all("\ufffd" not in part for part in streamed(tokenizer, ids)[0])


def test_words_are_given_as_their_tokens_come(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the the a a b b")
    parts = streamed(tokenizer, ids)[0]
    first = next(
        place for place, token in enumerate(ids) if tokenizer.decode([ids[0], token]) != ""
    )
    given = [
        token in tokenizer.byte_ids or bool(part) for token, part in zip(ids, parts, strict=False)
    ]
    assert all(given[first + 1 :])


def test_an_endless_tail_is_given_in_parts(tokenizer: Tokenizer) -> None:
    """Its bytes are no text; the work per token stays constant."""
    lone = next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"), None)
    if lone is None:
        return
    stream = TextStream(tokenizer)
    waiting = 0
    for _ in range(200):
        waiting = 0 if stream.push(lone) else waiting + 1
        assert waiting < 17


def test_work_does_not_grow_with_the_answer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(1)
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    lone_and_special = [tokenizer.pad_id, *range(min(3, tokenizer.vocab_size))]
    for ids in (
        generator.choices(range(tokenizer.vocab_size), k=2000),
        [tokenizer.pad_id] * 500,
        lone_and_special * 99,
    ):
        decoded.clear()
        streamed(tokenizer, ids)
        assert max(decoded) <= 40
        assert sum(decoded) <= 24 * len(ids)


def first_stop(text: str, stop: Sequence[str]) -> str:
    """The definition: the text grows by characters until it ends with a stop string; the longest
    such is left out."""
    for end in range(1, len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_stop_strings_are_found_across_tokens(tokenizer: Tokenizer) -> None:
    generator = random.Random(2)
    found = 0
    for _ in range(1000):
        ids = tokenizer.encode("".join(generator.choices("ab the", k=40)))
        whole = tokenizer.decode(ids)
        stop = ["".join(generator.choices("ab the", k=generator.randrange(1, 6))) for _ in range(3)]
        parts, stopped = streamed(tokenizer, ids, stop)
        assert "".join(parts) == first_stop(whole, stop), (whole, stop)
        assert stopped == any(one in whole for one in stop)
        found += stopped
    assert 200 < found < 1000


def test_the_beginning_of_a_stop_string_waits_and_comes_when_it_is_none(
    every_tokenizer: dict[str, Tokenizer],
) -> None:
    tokenizer = every_tokenizer["sentencepiece"]
    stream = TextStream(tokenizer, ("END", "NDX"))
    pushes = ["".join(stream.push(i) for i in tokenizer.encode(part)) for part in ("xE", "N", "D")]
    assert (pushes, stream.stopped, stream.finish()) == (["x", "", ""], True, "")
    stream = TextStream(tokenizer, ("ENDE", "NDX"))
    pushes = [
        "".join(stream.push(i) for i in tokenizer.encode(part)) for part in ("xE", "ND", "a", "EN")
    ]
    assert (pushes, stream.stopped, stream.finish()) == (["x", "", "ENDa", ""], False, "EN")


def test_of_stop_strings_in_text_that_comes_at_once_the_first_complete_one_counts(
    every_tokenizer: dict[str, Tokenizer],
) -> None:
    """As it would if the text came letter by letter."""
    tokenizer = every_tokenizer["byte_fallback"]
    ids = tokenizer.encode("漢字は長い")
    assert "".join(streamed(tokenizer, ids, ("漢字は", "字"))[0]) == "漢"
    assert "".join(streamed(tokenizer, ids, ("字", "漢字"))[0]) == ""


def test_nothing_comes_after_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("a",))
    assert "".join(map(stream.push, tokenizer.encode("a"))) + stream.finish() == ""
    assert stream.stopped
    assert "".join(map(stream.push, tokenizer.encode("b the b"))) + stream.finish() == ""


def test_a_stop_string_may_be_complete_only_at_the_end(
    every_tokenizer: dict[str, Tokenizer],
) -> None:
    """The last byte of a run waits for more; what then ends the answer is still seen."""
    tokenizer = every_tokenizer["byte_fallback"]
    stream = TextStream(tokenizer, ("😀",))
    given = "".join(stream.push(token) for token in tokenizer.encode("the 😀"))
    assert (given + stream.finish(), stream.stopped) == ("the ", True)
