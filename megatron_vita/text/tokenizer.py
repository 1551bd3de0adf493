"""Tokenizers: a Hugging Face folder or a SentencePiece model behind one face, with this project's
special tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import KeysView, Sequence
from functools import cached_property
from pathlib import Path

from megatron_vita.errors import ConfigError

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
"""Special tokens of Long-VITA's prompts and of ChatML, in the order in which they are appended."""


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are reached by `special_id` alone, never by their
    names in a text."""

    def __init__(
        self, special_ids: dict[str, int], vocab_size: int, *, appended: Sequence[str] = ()
    ) -> None:
        self._special_ids = special_ids
        self.vocab_size = vocab_size
        """Highest id + 1."""
        self.appended = tuple(appended)
        """Special tokens that the file lacks, which have the last ids."""
        self.chat_template = ""
        """The Jinja chat template of its folder, if there is one."""
        self.named_tokens: dict[str, str] = {}
        """Tokens by what they are for (`bos_token`, `eos_token`, ...), as its folder names them."""
        self.stripping: dict[str, tuple[bool, bool]] = {}
        """Special tokens that swallow white space before or after them, in a template's text."""

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

    def token_id(self, name: str, field: str) -> int:
        """Id of a token of any kind. ConfigError, naming the field that names it, if there is
        none."""
        if name in self._special_ids:
            return self._special_ids[name]
        index = self._vocabulary_id(name)
        if index is None:
            raise ConfigError(f"{field} names {name!r}, which is no token of the tokenizer")
        return index

    @property
    def begin_token(self) -> str:
        """The special token that its folder puts before every text; "" if it puts none."""
        return ""

    @abstractmethod
    def _vocabulary_id(self, piece: str) -> int | None:
        """Id of an entry of the vocabulary, by its spelling there; None if there is none."""

    @property
    def special_names(self) -> KeysView[str]:
        """Names of all special tokens."""
        return self._special_ids.keys()

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
        """Id of the token that fills what nothing else does: `<|endoftext|>`, or what the folder
        names as pad_token or eos_token, or the first one."""
        for name in (PAD, *(self.named_tokens.get(use, "") for use in ("pad_token", "eos_token"))):
            if name in self._special_ids:
                return self._special_ids[name]
        return 0


def load_tokenizer(path: str | Path, *, added: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Read a Hugging Face tokenizer folder or a SentencePiece `.model` file. Nothing is downloaded.

    Special tokens of `added` that are missing get the ids after the last one, in order (of Qwen2.5:
    151665 and on).

    Raises:
        ConfigError: there is no such tokenizer, it puts spaces between texts that are encoded one
            by one, or it is a SentencePiece model that loses line breaks.
    """
    path = Path(path)
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
    joined = tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b"))
    if joined == "a b":
        raise ConfigError(
            f"{path}: this tokenizer puts a space before every text ('a' and 'b' decode to {joined!r}), "
            "so that turns cannot be encoded one by one; use its SentencePiece .model file instead"
        )
    return tokenizer


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece entry: `<0x0A>` is a byte, and the lower one eighth block a
    space."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte.group(1))
    return piece.replace("\u2581", " ").encode()
