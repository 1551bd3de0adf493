"""Tokenizers of SentencePiece `.model` files."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_vita.errors import ConfigError
from megatron_vita.text.tokenizer_base import SPECIAL_TOKENS, Tokenizer, piece_bytes

# A ModelProto's field 3 (normalizer_spec) with add_dummy_prefix and remove_extra_whitespaces false.
# Protocol buffers merge a repeated singular message into the first, so that appending these bytes
# to a model changes just these fields.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as the bytes of its file, set to keep all spaces and to add
    none."""

    def __init__(self, model: bytes, *, added: Sequence[str] = SPECIAL_TOKENS) -> None:
        self._model = model
        self._added = tuple(added)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model + _KEEP_SPACES)
        size = self._processor.vocab_size()
        special = {
            self._processor.id_to_piece(index): index
            for index in range(size)
            if self._is_special(index)
        }
        missing = [name for name in added if name not in special]
        special |= {name: size + place for place, name in enumerate(missing)}
        self._names = {index: name for name, index in special.items()}
        super().__init__(special, size + len(missing), appended=missing)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(SentencePieceTokenizer, added=self._added), (self._model,)

    def _is_special(self, index: int) -> bool:
        return self._processor.is_control(index) or self._processor.is_unknown(index)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See Tokenizer."""
        # SentencePiece does not know appended tokens, and drops control symbols.
        return "".join(self._decode_run(run, skip_special) for run in _runs(ids, self.special_ids))

    def _decode_run(self, ids: list[int], skip_special: bool) -> str:
        if ids[0] not in self.special_ids:
            return self._processor.decode(ids)
        if skip_special:
            return ""
        return "".join(self._names[index] for index in ids)

    def token_bytes(self, index: int) -> bytes:
        """See Tokenizer."""
        if index in self.special_ids:
            return self._names[index].encode()
        if index < self._processor.vocab_size():
            return piece_bytes(self._processor.id_to_piece(index))
        return b""

    def _vocabulary_id(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        if self._processor.is_unknown(index):
            return None
        return index

    @cached_property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        # The bytes of the model hold the vocabulary; appended tokens are not in them.
        names = json.dumps(self._special_ids, sort_keys=True)
        return hashlib.sha256(self._model + names.encode()).hexdigest()


def _runs(ids: Iterable[int], special_ids: frozenset[int]) -> list[list[int]]:
    """Group adjacent ids into runs that are all special or all ordinary, as plain ints."""
    groups = itertools.groupby(map(int, ids), key=lambda index: index in special_ids)
    return [list(group) for _, group in groups]


def read_model(path: Path, *, added: Sequence[str]) -> SentencePieceTokenizer:
    """Read a model file.

    Raises:
        ConfigError: naming the file: it is not a SentencePiece model, or loses line breaks.
    """
    model = path.read_bytes()
    try:
        tokenizer = SentencePieceTokenizer(model, added=added)
    except RuntimeError as error:
        raise ConfigError(f"{path}: not a SentencePiece model: {error}") from error
    if tokenizer.decode(tokenizer.encode("\n")) != "\n":
        raise ConfigError(
            f"{path}: a line break does not come back from this model; it must be trained with "
            "normalization_rule_name=identity and byte_fallback=true"
        )
    return tokenizer
