"""Pieces that conversations are encoded to: runs of token ids, and places of media."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPiece:
    """Token ids that follow one another, and whether their prediction is scored."""

    ids: list[int]
    loss: bool


@dataclass(frozen=True)
class MediaPiece:
    """The place of the next image or video; `kind` is "image" or "video". Its tokens are never
    scored."""

    kind: str


EncodedTurn = list[TextPiece | MediaPiece]


def append_ids(pieces: EncodedTurn, ids: list[int], *, loss: bool) -> None:
    """Add ids to the last piece if that is text of the same kind, so that a turn has as few pieces
    as it can."""
    if not ids:
        return
    last = pieces[-1] if pieces else None
    if isinstance(last, TextPiece) and last.loss == loss:
        last.ids.extend(ids)
    else:
        pieces.append(TextPiece(list(ids), loss))
