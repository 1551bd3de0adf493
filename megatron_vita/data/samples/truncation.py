"""Truncation of documents longer than a pack by the recipe's policy, from the index alone."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_vita.data.samples.records import Kind


class Piece(NamedTuple):
    """A piece of a document: text, or a medium with its wrapping tokens."""

    kind: Kind
    tokens: int
    tiles: int = 0


@dataclass(frozen=True)
class Truncated:
    """Sizes of a document after truncation."""

    tokens: int
    tiles: int
    loss_tokens: int  # tokens that carry loss
    kept: tuple[int, ...]  # tiles of each of its media, in order; 0 for one that is left out


def untruncated(pieces: Sequence[Piece]) -> Truncated:
    """Sizes of a whole document."""
    return _summarize(pieces, [piece.tiles for piece in pieces if piece.kind >= Kind.IMAGE])


def truncate(
    pieces: Sequence[Piece], *, limit: int, policy: str, video_tokens: Callable[[int], int]
) -> Truncated | None:
    """Truncate a document of more than `limit` tokens; None if no token with loss remains.

    Policies: `reject` keeps nothing. `cut` keeps the beginning; a medium is not cut but dropped
    with all that follows. `drop_media` keeps all text and the first media that fit; the last video
    that does not fit keeps as many frames as do, sampled evenly.

    Args:
        pieces: pieces of the document.
        limit: tokens of a pack.
        policy: `data.overlong` of the recipe.
        video_tokens: number of tokens of a video by its number of frames.
    """
    if policy == "reject":
        return None
    if policy == "cut":
        found: Truncated | None = _cut(pieces, limit)
    else:
        found = _drop_media(pieces, limit, video_tokens)
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
            # After the first medium that does not fit, later ones go even if they would.
            if full:
                piece = _fewer_frames(piece, 0, video_tokens)
            elif piece.tokens > left:
                piece = _fewer_frames(piece, left, video_tokens)
                full = True
            left -= piece.tokens
        changed.append(piece)
    return _summarize(changed, [piece.tiles for piece in changed if piece.kind >= Kind.IMAGE])


def _fewer_frames(piece: Piece, room: int, video_tokens: Callable[[int], int]) -> Piece:
    frames = 0
    if piece.kind == Kind.VIDEO:
        # Bisection, since the tokens of frame labels differ: there is no formula to invert.
        counts = range(1, piece.tiles + 1)
        frames = bisect.bisect_right(counts, room, key=video_tokens)
    if not frames:
        return Piece(piece.kind, 0, 0)
    return Piece(piece.kind, video_tokens(frames), frames)


def _summarize(pieces: Sequence[Piece], kept: list[int]) -> Truncated:
    loss_tokens = sum(piece.tokens for piece in pieces if piece.kind == Kind.LOSS)
    opens = next((piece for piece in pieces if piece.tokens), None)
    if opens is not None and opens.kind == Kind.LOSS:
        # Nothing comes before a first token to predict it.
        loss_tokens -= 1
    return Truncated(
        tokens=sum(piece.tokens for piece in pieces),
        tiles=sum(kept),
        loss_tokens=loss_tokens,
        kept=tuple(kept),
    )
