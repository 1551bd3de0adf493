"""Tokenizers of Hugging Face folders."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from megatron_vita.errors import ConfigError
from megatron_vita.text.tokenizer_base import SPECIAL_TOKENS, Tokenizer, piece_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts are encoded one by one, which threads of `tokenizers` do not speed up. Without threads,
# processes that use it can be forked, too.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, constructed from its JSON."""

    def __init__(
        self,
        definition: str,
        *,
        added: Sequence[str] = SPECIAL_TOKENS,
        chat_template: str = "",
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._definition = definition
        self._settings: dict[str, Any] = {
            "added": tuple(added),
            "chat_template": chat_template,
            "named_tokens": named_tokens,
        }
        self._backend = tokenizers.Tokenizer.from_str(definition)
        # Files keep the truncation and padding of their last use, which would cut long documents.
        self._backend.no_truncation()
        self._backend.no_padding()
        own = self._backend.get_vocab()
        self._backend.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False) for name in added]
        )
        # Names of special tokens in a text are then encoded as ordinary characters.
        self._backend.encode_special_tokens = True
        known = self._backend.get_added_tokens_decoder()
        special = {token.content: index for index, token in sorted(known.items()) if token.special}
        # Ids may have gaps: the size is by the highest id, not by the number of entries.
        super().__init__(
            special,
            max(self._backend.get_vocab().values()) + 1,
            appended=[name for name in added if name not in own],
        )
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self.stripping = {
            token.content: (token.lstrip, token.rstrip)
            for token in known.values()
            if token.special and (token.lstrip or token.rstrip)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(HuggingFaceTokenizer, **self._settings), (self._definition,)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        # The fast method computes no offsets, which are needed only for the rare case below.
        ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.special_ids.isdisjoint(ids):
            return ids
        encoding = self._backend.encode(text, add_special_tokens=False)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            # A model that looks up whole words finds the name of a special token in its vocabulary:
            # encode the name in two parts.
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
        if self._spells_bytes:
            return _spelled_bytes(piece)
        return piece_bytes(piece)

    def _vocabulary_id(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def token_name(self, index: int) -> str | None:
        """Spelling of an entry of the vocabulary; None if there is no such id."""
        name = self._backend.id_to_token(index)
        if name is None:
            return None
        return str(name)

    @property
    def begin_token(self) -> str:
        """See Tokenizer."""
        # Any text shows it; a vocabulary without this character may give no ids.
        ids = self._backend.encode("a").ids
        if not ids or ids[0] not in self.special_ids:
            return ""
        return str(self._backend.id_to_token(ids[0]))

    @cached_property
    def _spells_bytes(self) -> bool:
        """Return true if the vocabulary is byte-level: each character of an entry represents a
        byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self._definition)["decoder"])

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """See Tokenizer. `ByteFallback` decoders find these tokens by name."""
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


def _byte_characters() -> dict[str, int]:
    """Map GPT-2's characters for bytes to the bytes.

    Printable Latin-1 characters represent themselves; the other bytes are U+0100 and on, in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_CHARACTERS = _byte_characters()


def _spelled_bytes(piece: str) -> bytes:
    """Bytes of an entry of a byte-level vocabulary; an entry added as plain text is its UTF-8."""
    if not all(character in _BYTE_CHARACTERS for character in piece):
        return piece.encode()
    return bytes(_BYTE_CHARACTERS[character] for character in piece)


def read_folder(path: Path, *, added: Sequence[str]) -> HuggingFaceTokenizer:
    """Read a tokenizer folder with transformers.

    Raises:
        ConfigError: naming the folder: transformers cannot read it, or it has no fast tokenizer.
    """
    try:
        tokenizer = transformers_tokenizer(path)
    # The loaders of transformers raise exceptions of any type.
    except Exception as error:
        raise ConfigError(
            f"{path}: cannot read a Hugging Face tokenizer: {type(error).__name__}: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{path}: {type(tokenizer).__name__} has no tokenizer.json form; one that has is needed"
        )
    return HuggingFaceTokenizer(
        tokenizer.backend_tokenizer.to_str(),
        added=added,
        chat_template=_chat_template(path, tokenizer.chat_template),
        named_tokens=tokenizer.special_tokens_map,
    )


def transformers_tokenizer(folder: Path, **options: Any) -> "PreTrainedTokenizerBase":
    """Load a folder's tokenizer with transformers. Nothing is downloaded, and code of the folder,
    which transformers would otherwise offer on the terminal to run, is never run.
    """
    # Imported here: it takes seconds, and SentencePiece models do without.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, **options
    )


def _chat_template(folder: Path, of_tokenizer: str | dict[str, str] | None) -> str:
    """Chat template of a folder: the processor's file if there is one, else the tokenizer's.

    Raises:
        ConfigError: there are several templates and none is the default.
    """
    file = folder / "chat_template.json"
    if file.exists() and not (folder / "chat_template.jinja").exists():
        try:
            return str(json.loads(file.read_text())["chat_template"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: not a chat template: {error!r}") from error
    if isinstance(of_tokenizer, dict):
        if "default" not in of_tokenizer:
            raise ConfigError(
                f"{folder}: has the chat templates {', '.join(sorted(of_tokenizer))}, none of "
                "which is called default"
            )
        return of_tokenizer["default"]
    return of_tokenizer or ""
