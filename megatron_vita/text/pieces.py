"""Pieces of encoded conversations: runs of token ids, and positions of media."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPiece:
    """A run of token ids; with `loss` their prediction is trained."""

    ids: list[int]
    loss: bool


@dataclass(frozen=True)
class MediaPiece:
    """Position of the next image or video, whose tokens carry no loss; `kind` is "image" or
    "video"."""

    kind: str


EncodedTurn = list[TextPiece | MediaPiece]


def append_ids(pieces: EncodedTurn, ids: list[int], *, loss: bool) -> None:
    """Append ids, merged into the last piece if that is text with the same `loss`."""
    if not ids:
        return
    # Merged, since an index stores each piece of each sample.
    if pieces:
        last = pieces[-1]
        if isinstance(last, TextPiece) and last.loss == loss:
            last.ids.extend(ids)
            return
    pieces.append(TextPiece(list(ids), loss))
