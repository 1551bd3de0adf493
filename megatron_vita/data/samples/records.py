"""JSON record of a sample: a conversation with media, or raw text; and its encoded pieces."""

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
    """Kind of a piece of a document."""

    TEXT = 0
    LOSS = 1  # text with loss
    IMAGE = 2
    VIDEO = 3


def parse_record(data: bytes, name: str) -> dict[str, Any]:
    """Parse the JSON of a sample with `messages` or `text`.

    Raises:
        DataError: naming the sample by `name`: it is anything else.
    """
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
    # Null counts as absent, as in the tables that records are made of.
    for field in ("images", "videos"):
        record[field] = record.get(field) or []
    return record


def is_raw_text(record: Mapping[str, Any]) -> bool:
    """Return true for `{"text": ...}`: a document with loss on every token, split over packs.

    Null fields count as absent.
    """
    filled = {name for name in record if record[name] is not None}
    return "text" in filled and not filled & set(CHAT_FIELDS)


def check_record(record: Mapping[str, Any]) -> None:
    """Check that a sample is a conversation or raw text with a valid weight.

    Raises:
        DataError: naming field and value.
    """
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
    """Factor on the losses of a sample, 1 by default; raises DataError unless a number >= 0."""
    weight = record.get("weight")
    if weight is None:
        return 1.0
    # bool is a subclass of int, and the comparison also refuses NaN.
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < math.inf
    ):
        raise DataError(f"weight is {weight!r:.80}: a number of at least 0 is needed")
    return float(weight)


def encode_record(record: Mapping[str, Any], chat: ChatFormat) -> list[EncodedTurn]:
    """Encode a sample's turns, with positions of media; raw text is one turn."""
    if is_raw_text(record):
        check_record(record)
        return chat.raw_text(record["text"])
    return chat.encode(check_messages(record))


def pieces_of(turns: list[EncodedTurn]) -> tuple[list[Kind], list[int]]:
    """Kinds of a document's pieces in order, and numbers of tokens of texts; 0 for media."""
    kinds = []
    tokens = []
    for piece in (piece for turn in turns for piece in turn):
        if isinstance(piece, MediaPiece):
            # Tokens of media depend on tiling and frame sampling, which an index does not know.
            kinds.append(Kind[piece.kind.upper()])
            tokens.append(0)
            continue
        if piece.loss:
            kinds.append(Kind.LOSS)
        else:
            kinds.append(Kind.TEXT)
        tokens.append(len(piece.ids))
    return kinds, tokens
