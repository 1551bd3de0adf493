"""Documents that are longer than a pack: what is left of them, by the recipe's policy, known from
the index alone."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_vita.data.samples.records import Kind


class Piece(NamedTuple):
    """A piece of a document in the sequence: text, or a medium with its wrapping tokens."""

    kind: Kind
    tokens: int
    tiles: int = 0


@dataclass(frozen=True)
class Truncated:
    """What is left of a document."""

    tokens: int
    tiles: int
    loss_tokens: int  # tokens whose prediction is scored
    kept: tuple[int, ...]  # tiles of each of its media, in order; 0 for one that is left out


def untruncated(pieces: Sequence[Piece]) -> Truncated:
    """All of it."""
    return _summarize(pieces, [piece.tiles for piece in pieces if piece.kind >= Kind.IMAGE])


def truncate(
    pieces: Sequence[Piece], *, limit: int, policy: str, video_tokens: Callable[[int], int]
) -> Truncated | None:
    """What `policy` leaves of a document of more than `limit` tokens; None where that is nothing to
    learn from.

    `reject`: nothing. `cut`: its beginning; a medium is not cut but left out with all that follows.
    `drop_media`: all text, and media from the first on as far as they fit; of the last video as
    many frames as fit, taken evenly from the whole of it. `video_tokens` gives the tokens of a
    video of so many frames.
    """
    if policy == "reject":
        return None
    found = _cut(pieces, limit) if policy == "cut" else _drop_media(pieces, limit, video_tokens)
    if found is not None and found.loss_tokens > 0:
        return found
    return None


def _cut(pieces: Sequence[Piece], limit: int) -> Truncated:
    kept: list[Piece] = []
    left = limit
    for piece in pieces:
        if piece.tokens <= left:
            kept.append(piece)
            left -= piece.tokens
            continue
        if piece.kind < Kind.IMAGE and left:
            kept.append(piece._replace(tokens=left))
        break
    media = sum(piece.kind >= Kind.IMAGE for piece in pieces)
    tiles = [piece.tiles for piece in kept if piece.kind >= Kind.IMAGE]
    return _summarize(kept, tiles + [0] * (media - len(tiles)))


def _drop_media(
    pieces: Sequence[Piece], limit: int, video_tokens: Callable[[int], int]
) -> Truncated | None:
    left = limit - sum(piece.tokens for piece in pieces if piece.kind < Kind.IMAGE)
    if left < 0:
        return None
    changed = []
    full = False
    for piece in pieces:
        if piece.kind >= Kind.IMAGE:
            if full or piece.tokens > left:
                piece = _fewer_frames(piece, 0 if full else left, video_tokens)
                full = True
            left -= piece.tokens
        changed.append(piece)
    return _summarize(changed, [piece.tiles for piece in changed if piece.kind >= Kind.IMAGE])


def _fewer_frames(piece: Piece, room: int, video_tokens: Callable[[int], int]) -> Piece:
    frames = 0
    if piece.kind == Kind.VIDEO:
        # of frames that need more tokens than there is room for, the fewest but one
        counts = range(1, piece.tiles + 1)
        frames = bisect.bisect_right(counts, room, key=video_tokens)
    return Piece(piece.kind, video_tokens(frames) if frames else 0, frames)


def _summarize(pieces: Sequence[Piece], kept: list[int]) -> Truncated:
    loss_tokens = sum(piece.tokens for piece in pieces if piece.kind == Kind.LOSS)
    opens = next((piece for piece in pieces if piece.tokens), None)
    return Truncated(
        tokens=sum(piece.tokens for piece in pieces),
        tiles=sum(kept),
        # nothing comes before a first token to predict it
        loss_tokens=loss_tokens - (opens is not None and opens.kind == Kind.LOSS),
        kept=tuple(kept),
    )
