"""Tokenization of conversations and raw text, by a tokenizer and a recipe's `text`."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_vita.config import TextConfig
from megatron_vita.errors import ConfigError
from megatron_vita.text.conversation import MediaPart, TextPart, Turn, merge_texts
from megatron_vita.text.media_tokens import MEDIA_FORMATS, MediaFormat
from megatron_vita.text.own_template import OwnTemplate
from megatron_vita.text.pieces import EncodedTurn, TextPiece
from megatron_vita.text.template import TEMPLATES, Template, frame_opening, frame_turn
from megatron_vita.text.tokenizer_base import Tokenizer

_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """Prompt format of a tokenizer and a recipe's `text`, the same for training and serving."""

    tokenizer: Tokenizer
    text: TextConfig = field(default_factory=TextConfig)

    def __reduce__(self) -> tuple[type["ChatFormat"], tuple[Tokenizer, TextConfig]]:
        return ChatFormat, (self.tokenizer, self.text)

    def check(self) -> None:
        """Check that the tokenizer has the tokens and the chat template that the recipe names.

        Raises:
            ConfigError: a token is missing, or nothing ends an answer.
        """
        for name in filter(None, (self.text.begin_token, self.text.end_token)):
            self.tokenizer.special_id(name)
        if not self.stop_ids:
            raise ConfigError(
                "text.stop_tokens is empty, and neither the tokenizer nor its chat template has "
                "a token that ends an answer: name one"
            )

    def encode(self, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Encode a conversation; answers and the tokens that end them carry loss.

        The built-in templates encode turn by turn; `jinja` encodes the whole conversation, which is
        returned as one turn.

        Raises:
            DataError: naming the turn that the template cannot render.
        """
        whole = self._with_system(turns)
        if self._own is not None:
            return [self._own.encode(whole, first=len(whole) - len(turns))]
        return [*self._begin(), *map(self._framed, whole)]

    def prompt(self, turns: Sequence[Turn]) -> list[EncodedTurn]:
        """Encode a conversation up to the beginning of the next answer."""
        whole = self._with_system(turns)
        if self._own is not None:
            return [self._own.prompt(whole)]
        prompt = [*self._begin(), *map(self._framed, whole)]
        opening = frame_opening("assistant", tokenizer=self.tokenizer, template=self._frame)
        if opening:
            prompt.append([TextPiece(opening, loss=False)])
        return prompt

    def raw_text(self, text: str) -> list[EncodedTurn]:
        """Encode raw text with its begin and end tokens; all tokens carry loss."""
        ends = self.tokenizer.special_id(self.end_token)
        return [[TextPiece([*self._begin_ids, *self.tokenizer.encode(text), ends], loss=True)]]

    def media(self, *, image_token_length: int) -> MediaFormat:
        """Placeholder format of images and videos, with `image_token_length` placeholders for a
        tile."""
        return self.media_format(self.tokenizer, image_token_length=image_token_length)

    @property
    def media_format(self) -> type[MediaFormat]:
        """Class of the placeholder format that the recipe names."""
        return MEDIA_FORMATS[self.text.media_format]

    @cached_property
    def end_token(self) -> str:
        """Name of the token that ends raw text.

        Raises:
            ConfigError: neither the recipe nor the tokenizer names one.
        """
        named = self.tokenizer.named_tokens.get("eos_token", "")
        if self.text.end_token:
            return self.text.end_token
        for name in (*_ENDS_OF_TEXT, named):
            if name in self.tokenizer.special_names:
                return name
        raise ConfigError(
            "text.end_token is empty, and the tokenizer has no token that ends a text: name one"
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids of the tokens that end an answer.

        These are the template's end of turn, the tokenizer's ends of text, and `text.stop_tokens`.

        Raises:
            ConfigError: one of `text.stop_tokens` is not in the vocabulary.
        """
        # All that the tokenizer has: models of one family end answers with different ones.
        ends = [self.end_of_turn, *_ENDS_OF_TEXT, self.tokenizer.named_tokens.get("eos_token", "")]
        known = [name for name in ends if name in self.tokenizer.special_names]
        asked = [
            self.tokenizer.token_id(name, "text.stop_tokens") for name in self.text.stop_tokens
        ]
        return frozenset([*map(self.tokenizer.special_id, known), *asked])

    @property
    def end_of_turn(self) -> str:
        """Name of the special token that ends an answer; "" if there is none."""
        if self._own is None:
            return self._frame.closing
        return self._own.end_of_turn

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over everything but the vocabulary that determines token ids.

        Raises:
            ConfigError: the template writes today's date and `text.date` does not fix it, so that
                ids would change from day to day.
        """
        text = self.text
        own = self._own
        described: dict[str, Any] = {
            "system": text.system,
            "begin_token": text.begin_token,
            "end_tokens": [text.end_token, self.tokenizer.named_tokens.get("eos_token", "")],
        }
        if own is None:
            described["frame"] = dataclasses.asdict(self._frame)
        else:
            if own.writes_date and not text.date:
                raise ConfigError(
                    "text.date is empty, but the tokenizer's chat template writes today's date: "
                    "set it to the day to train with, as 2026-01-31"
                )
            # A template that writes no date gives the same ids on any: the date must not count.
            described |= {
                "source": self.tokenizer.chat_template,
                "names": self.tokenizer.named_tokens,
                "date": text.date if own.writes_date else "",
            }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _own(self) -> OwnTemplate | None:
        if self.text.template != "jinja":
            return None
        return OwnTemplate(self.tokenizer, self.media_format, self.text.date)

    @cached_property
    def _frame(self) -> Template:
        template = TEMPLATES[self.text.template]
        return dataclasses.replace(template, closing=template.closing or self.end_token)

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        if self.text.system and (not turns or turns[0].role != "system"):
            return [Turn("system", [TextPart(self.text.system)]), *turns]
        return list(turns)

    @property
    def _begin_ids(self) -> list[int]:
        name = self.text.begin_token
        if name:
            return [self.tokenizer.special_id(name)]
        return []

    def _begin(self) -> list[EncodedTurn]:
        if self.text.begin_token:
            return [[TextPiece(self._begin_ids, loss=False)]]
        return []

    def _framed(self, turn: Turn) -> EncodedTurn:
        parts: list[TextPart | MediaPart] = []
        # Tags inside a text come with the white space that the author wrote; only a list of parts
        # leaves it to the format.
        given = turn.parts
        if turn.listed:
            given = self.media_format.laid_out(given)
        for part in given:
            if part == MediaPart("video"):
                parts.append(TextPart(self.media_format.video_opening))
            parts.append(part)
        turn = dataclasses.replace(turn, parts=merge_texts(parts))
        return frame_turn(turn, tokenizer=self.tokenizer, template=self._frame)
