"""JSON record of a sample: a conversation with media, perhaps with a rejected answer, or raw text;
and its encoded pieces."""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from megatron_vita.errors import DataError
from megatron_vita.text.chat_format import ChatFormat
from megatron_vita.text.conversation import (
    CHAT_FIELDS,
    TextPart,
    Turn,
    check_messages,
    check_unicode,
)
from megatron_vita.text.pieces import EncodedTurn, MediaPiece

REJECTED = "rejected_response"
"""Field of a pair: the rejected answer in the place of the last one of its messages."""


class Kind(IntEnum):
    """Kind of a piece of a document; media have the highest numbers."""

    # The end of a pair's chosen conversation, padded: the rejected one follows.
    BOUNDARY = -1
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
    """Check that a sample is a conversation, a pair or raw text with a valid weight.

    Raises:
        DataError: naming field and value.
    """
    weight_of(record)
    if not is_raw_text(record):
        _check_rejected(record, check_messages(record))
        return
    if is_pair(record):
        raise DataError(f"{REJECTED} is given beside a text: a conversation (messages) is needed")
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


def is_pair(record: Mapping[str, Any]) -> bool:
    """Return true for a conversation whose last answer was chosen over another one."""
    return record.get(REJECTED) is not None


def _check_rejected(record: Mapping[str, Any], turns: list[Turn]) -> None:
    """Check the rejected answer of a pair.

    Raises:
        DataError: it is no text or the same as the chosen one, or the messages do not end with a
            text that is trained and answers a user.
    """
    if not is_pair(record):
        return
    rejected = record[REJECTED]
    if not isinstance(rejected, str) or not rejected.strip():
        raise DataError(f"{REJECTED} is {rejected!r:.80}: the text of an answer is needed")
    check_unicode([TextPart(rejected)], REJECTED)
    last = turns[-1]
    is_asked = any(turn.role == "user" for turn in turns[:-1])
    if not is_asked or last.role != "assistant" or not last.loss:
        raise DataError(
            f"{REJECTED} is {rejected!r:.80}: messages must end with an answer to a user that it "
            f"is compared with; their roles are {[turn.role for turn in turns]}"
        )
    texts = [part.text for part in last.parts if isinstance(part, TextPart)]
    if len(texts) != len(last.parts) or not "".join(texts).strip():
        raise DataError(
            f"{REJECTED} is given, and the last of messages is {last.parts!r:.80}: the text of a chosen "
            "answer is needed"
        )
    if last.parts == [TextPart(rejected)]:
        raise DataError(f"{REJECTED} is the chosen answer itself: {rejected!r:.80}")


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


def encode_record(record: Mapping[str, Any], chat: ChatFormat) -> list[list[EncodedTurn]]:
    """Encode the conversations of a sample, each as turns with positions of media.

    Raw text is one turn. A pair is two conversations, the chosen one first, whose last answers
    alone carry loss.
    """
    if is_raw_text(record):
        check_record(record)
        return [chat.raw_text(record["text"])]
    turns = check_messages(record)
    if not is_pair(record):
        return [chat.encode(turns)]
    _check_rejected(record, turns)
    before = [dataclasses.replace(turn, loss=turn.role != "assistant") for turn in turns[:-1]]
    rejected = dataclasses.replace(turns[-1], parts=[TextPart(record[REJECTED])], listed=False)
    return [chat.encode([*before, answer]) for answer in (turns[-1], rejected)]


def pieces_of_sample(conversations: list[list[EncodedTurn]]) -> tuple[list[Kind], list[int]]:
    """Kinds and tokens of a sample's pieces as `pieces_of`, with the boundary of a pair."""
    kinds, tokens = pieces_of(conversations[0])
    for turns in conversations[1:]:
        more_kinds, more_tokens = pieces_of(turns)
        # How long it is depends on the alignment of documents, which an index does not know.
        kinds = [*kinds, Kind.BOUNDARY, *more_kinds]
        tokens = [*tokens, 0, *more_tokens]
    return kinds, tokens


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
