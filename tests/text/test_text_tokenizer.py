"""Tokenizers: ids, special tokens and text that comes back."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel, Fuse, Metaspace

from megatron_vita.errors import ConfigError
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import MEDIA_TOKENS, SPECIAL_TOKENS, Tokenizer
from megatron_vita.text.train import train_sentencepiece
from tests.text.published import byte_level_bpe

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs 0123456789",
] * 20

TEXTS = [
    "plain words",
    " two  spaces, \ttab\n\nand breaks\r\n ",
    "日本語 and é, ☃ and 𝄞",
    "a\0b",
    "code:\n    if x:\n        y = [1, 22, 333]\n",
    "<image> <img></img><IMG_CONTEXT><|im_end|><|im_start|>user\n<|endoftext|></s><unk><0x0A>",
    "".join(SPECIAL_TOKENS),
]


def save_folder(folder: Path, tokenizer: tokenizers.Tokenizer, **names: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def byte_level(*special: str, vocab_size: int = 300) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer of Qwen's kind: its three special tokens come after its vocabulary."""
    qwen = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return save_folder(
        tmp_path_factory.mktemp("tokenizer"), byte_level(*qwen), eos_token="<|im_end|>"
    )


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    train_sentencepiece(CORPUS, path, vocab_size=340)
    return path


@pytest.fixture(params=["folder", "model_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def test_missing_special_tokens_follow_the_last_id_in_order(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.special_id(name) for name in MEDIA_TOKENS] == list(range(303, 320))
    known = [tokenizer.special_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert known == [300, 301, 302]
    assert tokenizer.vocab_size == 320


def test_a_tokenizer_without_any_special_token_gets_all_of_them_in_order(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_folder(tmp_path, byte_level()))
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(300, 320))


def test_a_trained_model_holds_the_special_tokens_itself(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(1, 21))
    assert tokenizer.vocab_size == 340


def foreign_model(folder: Path, normalization: str, *, byte_fallback: bool = True) -> Path:
    """A model trained as others are: with a dummy prefix, and without our special tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "foreign"),
        vocab_size=330 if byte_fallback else 60,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name=normalization,
        user_defined_symbols=["<image>"],
        minloglevel=2,
    )
    return folder / "foreign.model"


@pytest.mark.parametrize(
    ("normalization", "byte_fallback"), [("nmt_nfkc", True), ("identity", False)]
)
def test_a_model_that_loses_line_breaks_is_refused(
    tmp_path: Path, normalization: str, byte_fallback: bool
) -> None:
    with pytest.raises(ConfigError, match=r"foreign.model.*line break"):
        load_tokenizer(foreign_model(tmp_path, normalization, byte_fallback=byte_fallback))


def test_a_foreign_sentencepiece_model_gets_special_tokens_after_its_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(foreign_model(tmp_path, "identity"))
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(330, 350))
    assert tokenizer.vocab_size == 350
    pieces = ["the fox", "<image>", "  jumps", "\n", "over"]
    ids = [index for piece in pieces for index in tokenizer.encode(piece)]
    assert tokenizer.decode(ids) == "".join(pieces)
    named = tokenizer.decode(
        [tokenizer.pad_id, *ids, tokenizer.special_id("<img>")], skip_special=False
    )
    assert named == "<|endoftext|>" + "".join(pieces) + "<img>"
    assert not set(tokenizer.encode("".join(SPECIAL_TOKENS))) & tokenizer.special_ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged_without_a_special_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer.special_ids
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_texts_encoded_one_by_one_decode_to_the_texts_joined(tokenizer: Tokenizer) -> None:
    pieces = ["user\n", "What", " is", "this?", "\n", "", " ", "It", "'s", "\n\n", "fox"]
    assert tokenizer.decode(
        [index for piece in pieces for index in tokenizer.encode(piece)]
    ) == "".join(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_joined_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_a_special_token_stands_for_its_name_and_an_id_beyond_all_for_nothing(
    tokenizer: Tokenizer,
) -> None:
    assert tokenizer.token_bytes(tokenizer.special_id("<|im_end|>")) == b"<|im_end|>"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_empty_text_has_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_a_newline_is_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n")) == 1


def test_special_tokens_are_left_out_or_named(tokenizer: Tokenizer) -> None:
    ids = [
        tokenizer.special_id("<|im_start|>"),
        *tokenizer.encode("the fox"),
        tokenizer.special_id("<|im_end|>"),
    ]
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>the fox<|im_end|>"


def test_pad_and_end_of_turn_are_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == tokenizer.special_id("<|endoftext|>")
    assert tokenizer.special_id("<|im_end|>") == tokenizer.special_id("<|im_end|>")


def test_an_unknown_special_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"'<imgs>' is not a special token.*<img>"):
        tokenizer.special_id("<imgs>")


def test_a_tokenizer_survives_pickling(tokenizer: Tokenizer) -> None:
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint
    assert other.vocab_size == tokenizer.vocab_size
    assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_fingerprint_is_of_the_contents(tmp_path: Path, folder: Path, model_file: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(model_file.read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(model_file).fingerprint
    assert load_tokenizer(folder).fingerprint == load_tokenizer(folder).fingerprint
    others = [
        byte_level("<|endoftext|>"),
        byte_level("<|endoftext|>", "<x>"),
        byte_level(vocab_size=299),
    ]
    folders = [
        folder,
        *(save_folder(tmp_path / str(index), other) for index, other in enumerate(others)),
    ]
    assert len({load_tokenizer(path).fingerprint for path in [*folders, model_file]}) == 5


def test_the_fingerprint_sees_merges_that_change_no_token(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    orders = [[("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]]
    folders = []
    for place, merges in enumerate(orders):
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        backend.decoder = Fuse()
        folders.append(save_folder(tmp_path / str(place), backend))
    first, second = map(load_tokenizer, folders)
    assert first.encode("abc") != second.encode("abc")
    assert first.fingerprint != second.fingerprint


def test_models_that_look_up_whole_words_yield_no_special_id_either(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "hello": 1, "</s>": 2, "<": 3, "/s>": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(save_folder(tmp_path, backend, eos_token="</s>"))
    assert tokenizer.special_id("</s>") == 2
    assert tokenizer.encode("hello </s>") == [1, 3, 4]


def test_a_tokenizer_that_adds_spaces_between_texts_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={"▁": 0, "a": 1, "b": 2, "▁a": 3}, merges=[("▁", "a")])
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = Metaspace()
    with pytest.raises(ConfigError, match=r"puts a space before every text.*\.model"):
        load_tokenizer(save_folder(tmp_path, backend))


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for name in ("missing.model", "bad.model", "empty", "missing"):
        with pytest.raises(ConfigError, match=name):
            load_tokenizer(tmp_path / name)


def test_names_of_special_tokens_are_encoded_as_if_they_were_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_folder(tmp_path, byte_level("quick")))
    assert tokenizer.encode("the quick fox") == byte_level().encode("the quick fox").ids


@pytest.mark.parametrize("name", ["none.model", "none"])
def test_a_tokenizer_that_is_not_there_is_said_to_be_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: no such file or folder"):
        load_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").touch()
    with pytest.raises(ConfigError, match=r"text\.txt is neither"):
        load_tokenizer(tmp_path / "text.txt")


def test_a_folder_of_vocabulary_and_merges_is_read_like_tokenizer_json(tmp_path: Path) -> None:
    """OpenGVLab's folders have no tokenizer.json, but Qwen2Tokenizer's earlier files."""
    backend = byte_level_bpe("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")
    definition = json.loads(backend.to_str())
    merges = [" ".join(merge) for merge in definition["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    added = {token["content"]: token["id"] for token in definition["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {str(i): plain | {"content": name, "special": True} for name, i in added.items()}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    config |= {"added_tokens_decoder": decoder, "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    tokenizer = load_tokenizer(tmp_path, added=())
    assert {name: tokenizer.special_id(name) for name in added} == added
    assert tokenizer.chat_template == "{{ messages }}"
    for text in ("hello world, what is this?\n\n 123 é", "the cat\u00a0sat  on 日本"):
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
