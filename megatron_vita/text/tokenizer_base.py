"""Common interface of Hugging Face and SentencePiece tokenizers, with this project's special
tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import KeysView, Sequence
from functools import cached_property

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
    """Conversion of text to token ids and back.

    Special tokens are reached only by `special_id`, never by their names in a text.
    """

    def __init__(
        self, special_ids: dict[str, int], vocab_size: int, *, appended: Sequence[str] = ()
    ) -> None:
        self._special_ids = special_ids
        self.vocab_size = vocab_size
        """Highest id + 1."""
        self.appended = tuple(appended)
        """Special tokens missing in the file, which got the last ids."""
        self.chat_template = ""
        """Jinja chat template of its folder; "" if there is none."""
        self.named_tokens: dict[str, str] = {}
        """Special tokens by purpose (`bos_token`, `eos_token`, ...), as its folder names them."""
        self.stripping: dict[str, tuple[bool, bool]] = {}
        """Special tokens that strip white space (before, after) them in a template's text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode text without special tokens: their names in it are encoded as ordinary characters.

        The concatenated ids of texts encoded one by one decode to the concatenated texts.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode ids to text; special tokens are omitted, or appear by name if `skip_special` is
        false."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes:
        """UTF-8 bytes of one token, perhaps a part of a character; the name of a special token."""

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over vocabulary, merges, special tokens and all else that affects
        encoding."""

    def special_id(self, name: str) -> int:
        """Id of a special token; raises ConfigError if there is none of that name."""
        if name not in self._special_ids:
            raise ConfigError(
                f"{name!r} is not a special token of this tokenizer; known: "
                f"{', '.join(self._special_ids)}"
            )
        return self._special_ids[name]

    def token_id(self, name: str, field: str) -> int:
        """Id of a token of any kind; raises ConfigError, naming `field`, if there is none."""
        if name in self._special_ids:
            return self._special_ids[name]
        index = self._vocabulary_id(name)
        if index is None:
            raise ConfigError(f"{field} names {name!r}, which is not a token of the tokenizer")
        return index

    @property
    def begin_token(self) -> str:
        """Special token that the tokenizer's own post-processor prepends to texts; "" if none."""
        return ""

    @abstractmethod
    def _vocabulary_id(self, piece: str) -> int | None:
        """Id of an entry of the vocabulary by its spelling; None if there is none."""

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
        """Ids of single-byte tokens that decode to text only in runs of valid UTF-8.

        Omitted special tokens do not end a run.
        """
        return frozenset()

    @property
    def pad_id(self) -> int:
        """Id of the padding token: `<|endoftext|>`, else the folder's pad_token or eos_token, else
        0."""
        for name in (PAD, *(self.named_tokens.get(use, "") for use in ("pad_token", "eos_token"))):
            if name in self._special_ids:
                return self._special_ids[name]
        return 0


def piece_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece entry: `<0x0A>` is a byte, and U+2581 a space."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte.group(1))
    return piece.replace("\u2581", " ").encode()
