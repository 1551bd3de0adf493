"""Tokenizers: a Hugging Face folder or a SentencePiece model behind one face, with this project's
special tokens."""

import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_vita.errors import ConfigError

# Texts are encoded one by one, which the threads of `tokenizers` do not speed up; unused, they
# allow a fork, too.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MEDIA_TOKENS = (
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<vid>", "</vid>", "<VID_CONTEXT>"),
    *("<patch>", "</patch>", "<PATCH_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
    *("<image>", "<video>"),
)
"""Special tokens that Long-VITA appends to its language model's tokenizer, in its order."""

END_OF_TURN = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = (*MEDIA_TOKENS, "<|im_start|>", END_OF_TURN, PAD)
"""Special tokens that every tokenizer has after loading: those it lacks are appended in this order."""

# A ModelProto's field 3 (normalizer_spec) with add_dummy_prefix and remove_extra_whitespaces false.
# Protocol buffers
# merge a repeated singular message into the first, so that appending these bytes to a model changes
# just these fields.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are reached by `special_id` alone, never by their
    names in a text."""

    def __init__(self, special_ids: dict[str, int], vocab_size: int) -> None:
        self._special_ids = special_ids
        self.vocab_size = vocab_size
        """Highest id + 1."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of them special: the name of a special token is encoded as the
        characters it has.

        Texts that are encoded one by one decode, when their ids are joined, to the texts joined.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out, or appear by name where `skip_special` is
        false."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that one token stands for, which may be a part of a character; a special
        token's name."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over all that decides how text is encoded: vocabulary, merges,
        special tokens."""

    def special_id(self, name: str) -> int:
        """Id of a special token. Raises ConfigError if there is none of that name."""
        if name not in self._special_ids:
            raise ConfigError(
                f"{name!r} is not a special token of this tokenizer; known: {', '.join(self._special_ids)}"
            )
        return self._special_ids[name]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self._special_ids.values())

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of tokens of one byte each that decode to text only if a whole run of them is UTF-8.

        Special tokens, where they are left out, do not end a run.
        """
        return frozenset()

    @property
    def pad_id(self) -> int:
        """Id of `<|endoftext|>`, which fills what nothing else does."""
        return self.special_id(PAD)

    @property
    def end_of_turn_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.special_id(END_OF_TURN)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a Hugging Face tokenizer folder or a SentencePiece `.model` file. Nothing is
    downloaded.

    Special tokens that are missing get the ids after the last one (of Qwen2.5: 151665 and on).
    Raises ConfigError if there is no such tokenizer, if it puts spaces between texts that are
    encoded one by one, or if it is a SentencePiece model that loses line breaks.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer: Tokenizer = HuggingFaceTokenizer(_read_folder(path))
    elif path.suffix == ".model" and path.is_file():
        tokenizer = _read_sentencepiece(path)
    else:
        raise ConfigError(
            f"{path} is neither a Hugging Face tokenizer folder nor a SentencePiece .model file"
        )
    joined = tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b"))
    if joined == "a b":
        raise ConfigError(
            f"{path}: this tokenizer puts a space before every text ('a' and 'b' decode to {joined!r}), "
            "so that turns cannot be encoded one by one; use its SentencePiece .model file instead"
        )
    return tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, given as its JSON."""

    def __init__(self, definition: str) -> None:
        self._definition = definition
        self._backend = tokenizers.Tokenizer.from_str(definition)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS]
        )
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: index for index, token in sorted(added.items()) if token.special}
        super().__init__(special, max(self._backend.get_vocab().values()) + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._definition,)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        # without offsets
        ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.special_ids.isdisjoint(ids):
            return ids
        encoding = self._backend.encode(text, add_special_tokens=False)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            # models that look whole words up in the vocabulary
            if index in self.special_ids and stop - start > 1:
                return self.encode(text[: start + 1]) + self.encode(text[start + 1 :])
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See Tokenizer."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, index: int) -> bytes:
        """See Tokenizer."""
        piece = self._backend.id_to_token(index)
        if piece is None:
            return b""
        if index in self.special_ids:
            return piece.encode()
        return _spelled_bytes(piece) if self._spells_bytes else _piece_bytes(piece)

    @cached_property
    def _spells_bytes(self) -> bool:
        """Whether each character of a vocabulary entry stands for a byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self._definition)["decoder"])

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """See Tokenizer. `ByteFallback` decoders know these tokens by name."""
        ids = (self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(index for index in ids if index is not None)

    @cached_property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        definition = json.loads(self._backend.to_str())
        decisive = {
            key: definition[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as the bytes of its file. It is made to keep all spaces and to
    add none."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model + _KEEP_SPACES)
        size = self._processor.vocab_size()
        special = {
            self._processor.id_to_piece(index): index
            for index in range(size)
            if self._is_special(index)
        }
        missing = [name for name in SPECIAL_TOKENS if name not in special]
        special |= {name: size + place for place, name in enumerate(missing)}
        self._names = {index: name for name, index in special.items()}
        super().__init__(special, size + len(missing))

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model,)

    def _is_special(self, index: int) -> bool:
        return self._processor.is_control(index) or self._processor.is_unknown(index)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See Tokenizer."""
        return "".join(self._decode_run(run, skip_special) for run in _runs(ids, self.special_ids))

    def _decode_run(self, ids: list[int], skip_special: bool) -> str:
        if ids[0] not in self.special_ids:
            return self._processor.decode(ids)
        return "" if skip_special else "".join(self._names[index] for index in ids)

    def token_bytes(self, index: int) -> bytes:
        """See Tokenizer."""
        if index in self.special_ids:
            return self._names[index].encode()
        return (
            _piece_bytes(self._processor.id_to_piece(index))
            if index < self._processor.vocab_size()
            else b""
        )

    @cached_property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        names = json.dumps(self._special_ids, sort_keys=True)
        return hashlib.sha256(self._model + names.encode()).hexdigest()


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters are themselves, others stand from
    U+0100 on in order."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_CHARACTERS = _byte_characters()


def _spelled_bytes(piece: str) -> bytes:
    """The bytes of an entry of a byte-level vocabulary; what was added to it as ordinary text is
    that text."""
    if not all(character in _BYTE_CHARACTERS for character in piece):
        return piece.encode()
    return bytes(_BYTE_CHARACTERS[character] for character in piece)


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece entry: `<0x0A>` is a byte, and the lower one eighth block a
    space."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte.group(1))
    return piece.replace("\u2581", " ").encode()


def _runs(ids: Iterable[int], special_ids: frozenset[int]) -> list[list[int]]:
    """Neighbours that are all special, or none of them, as lists of plain ints."""
    groups = itertools.groupby(map(int, ids), key=lambda index: index in special_ids)
    return [list(group) for _, group in groups]


def _read_folder(path: Path) -> str:
    from transformers import AutoTokenizer  # takes seconds, and SentencePiece models do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # whatever its many loaders raise
        raise ConfigError(
            f"{path}: cannot read a Hugging Face tokenizer: {type(error).__name__}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{path}: {type(tokenizer).__name__} has no tokenizer.json form; one that has is needed"
        )
    return tokenizer.backend_tokenizer.to_str()


def _read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    model = path.read_bytes()
    try:
        tokenizer = SentencePieceTokenizer(model)
    except RuntimeError as error:
        raise ConfigError(f"{path}: not a SentencePiece model: {error}") from error
    if tokenizer.decode(tokenizer.encode("\n")) != "\n":
        raise ConfigError(
            f"{path}: a line break does not come back from this model; it must be trained with "
            "normalization_rule_name=identity and byte_fallback=true"
        )
    return tokenizer
