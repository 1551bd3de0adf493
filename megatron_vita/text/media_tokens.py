"""The token sequence that stands for an image or a video, and its length. Layout: Long-VITA (arXiv
2502.05177)."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vita.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class MediaTokens:
    """One image or video in token ids.

    `offsets` holds the place in `ids` of each tile's first placeholder, in the order of the tiles:
    an image's thumbnail first, then its cells row by row; a video's frames in time.
    """

    ids: list[int]
    offsets: list[int]


def image_tokens(
    grid: tuple[int, int], *, image_token_length: int, tokenizer: Tokenizer
) -> MediaTokens:
    """`<img>` placeholders `</img>`; if `grid` (cols, rows) has more than one cell, then for each
    row a newline and for each of its cells `<patch>` placeholders `</patch>`."""
    cols, rows = grid
    ids, offsets = _wrapped("img", image_token_length, tokenizer), [1]
    if cols * rows > 1:
        newline = tokenizer.encode("\n")
        cell = _wrapped("patch", image_token_length, tokenizer)
        for _ in range(rows):
            ids += newline
            offsets += _starts(len(ids), cols, cell)
            ids += cell * cols
    return MediaTokens(ids, offsets)


def video_tokens(frames: int, *, image_token_length: int, tokenizer: Tokenizer) -> MediaTokens:
    """`<vid>` placeholders `</vid>` for each frame."""
    frame = _wrapped("vid", image_token_length, tokenizer)
    return MediaTokens(frame * frames, _starts(0, frames, frame))


def count_image_tokens(
    grid: tuple[int, int], *, image_token_length: int, newline_length: int
) -> int:
    """Length of `image_tokens`, where a newline is `newline_length` tokens."""
    cols, rows = grid
    tile = image_token_length + 2
    return tile + (rows * newline_length + cols * rows * tile if cols * rows > 1 else 0)


def count_video_tokens(frames: int, *, image_token_length: int) -> int:
    """Length of `video_tokens`."""
    return frames * (image_token_length + 2)


def _wrapped(kind: str, image_token_length: int, tokenizer: Tokenizer) -> list[int]:
    context = tokenizer.special_id(f"<{kind.upper()}_CONTEXT>")
    opening, closing = tokenizer.special_id(f"<{kind}>"), tokenizer.special_id(f"</{kind}>")
    return [opening, *[context] * image_token_length, closing]


def _starts(position: int, count: int, tile: Sequence[int]) -> list[int]:
    """Places of the first placeholders of `count` tiles that follow one another from `position`."""
    return [position + 1 + index * len(tile) for index in range(count)]
