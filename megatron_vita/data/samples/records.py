"""A sample's JSON: a conversation with media, or raw text; and the pieces that it becomes."""

import json
import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from megatron_vita.errors import DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import CHAT_FIELDS, check_messages
from megatron_vita.text.pieces import EncodedTurn, MediaPiece


class Kind(IntEnum):
    """What a piece of a document is."""

    TEXT = 0
    LOSS = 1  # text whose prediction is scored
    IMAGE = 2
    VIDEO = 3


def parse_record(data: bytes, name: str) -> dict[str, Any]:
    """The JSON of a sample, which has `messages` or `text`. DataError naming `name` if it is
    anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {error}") from error
    if not isinstance(record, dict) or not (
        is_raw_text(record) or isinstance(record.get("messages"), list)
    ):
        raise DataError(
            f"{name}: a sample is a JSON object with a list of messages, or with a text"
        )
    for field in ("images", "videos"):
        record[field] = record.get(field) or []
    return record


def is_raw_text(record: Mapping[str, Any]) -> bool:
    """Whether a sample is `{"text": ...}`: a document with loss on every token, split over packs
    where it is longer. Null is as good as absent."""
    filled = {name for name in record if record[name] is not None}
    return "text" in filled and not filled & set(CHAT_FIELDS)


def check_record(record: Mapping[str, Any]) -> None:
    """DataError, naming field and value, unless the sample is a conversation or raw text with a
    sensible weight."""
    weight_of(record)
    if not is_raw_text(record):
        check_messages(record)
        return
    text = record["text"]
    if not isinstance(text, str) or not text:
        raise DataError(f"text is {text!r:.80}: a string that is not empty is needed")
    if any(record.get(field) for field in ("images", "videos")):
        raise DataError(
            "a sample with a text has no images or videos: a conversation (messages) can have them"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has the lone surrogate {text[error.start]!r} at character {error.start}"
        ) from error


def weight_of(record: Mapping[str, Any]) -> float:
    """The factor on the losses of a sample, 1 where it names none. DataError unless it is a number
    of at least 0."""
    weight = record.get("weight")
    if weight is None:
        return 1.0
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < math.inf
    ):
        raise DataError(f"weight is {weight!r:.80}: a number of at least 0 is needed")
    return float(weight)


def encode_record(record: Mapping[str, Any], chat: ChatFormat) -> list[EncodedTurn]:
    """A sample's turns in token ids, with the places of its media; raw text is one turn that ends
    the text."""
    if is_raw_text(record):
        check_record(record)
        return chat.raw_text(record["text"])
    return chat.encode(check_messages(record))


def pieces_of(turns: list[EncodedTurn]) -> tuple[list[Kind], list[int]]:
    """Kinds of a document's pieces in order, and tokens of those that are text; 0 for media."""
    kinds = []
    tokens = []
    for piece in (piece for turn in turns for piece in turn):
        if isinstance(piece, MediaPiece):
            kinds.append(Kind.IMAGE if piece.kind == "image" else Kind.VIDEO)
            tokens.append(0)
        else:
            kinds.append(Kind.LOSS if piece.loss else Kind.TEXT)
            tokens.append(len(piece.ids))
    return kinds, tokens
