"""Truncation of documents that are longer than a pack."""

import pytest

from megatron_vita.data.samples.records import Kind
from megatron_vita.data.samples.truncation import Piece, Truncated, truncate, untruncated

_, TEXT, LOSS, IMAGE, VIDEO = Kind
QUESTION = Piece(TEXT, 10)
ANSWER = Piece(LOSS, 20)


def truncated(pieces: list[Piece], limit: int, policy: str) -> Truncated | None:
    return truncate(pieces, limit=limit, policy=policy, video_tokens=lambda frames: 6 * frames)


def test_all_of_a_document_is_counted() -> None:
    pieces = [QUESTION, Piece(IMAGE, 30, 5), ANSWER, Piece(VIDEO, 12, 2), ANSWER]
    assert untruncated(pieces) == Truncated(tokens=92, tiles=7, loss_tokens=40, kept=(5, 2))
    assert untruncated([ANSWER, QUESTION]) == Truncated(tokens=30, tiles=0, loss_tokens=19, kept=())


def test_reject_leaves_nothing() -> None:
    assert truncated([QUESTION, ANSWER], 29, "reject") is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (91, Truncated(tokens=91, tiles=7, loss_tokens=39, kept=(5, 2))),
        (73, Truncated(tokens=73, tiles=7, loss_tokens=21, kept=(5, 2))),
        # the video would be cut: it goes, and what follows
        (71, Truncated(tokens=60, tiles=5, loss_tokens=20, kept=(5, 0))),
        (45, Truncated(tokens=45, tiles=5, loss_tokens=5, kept=(5, 0))),
        (40, None),  # nothing is scored
        (39, None),
    ],
)
def test_cut_keeps_the_beginning_and_no_half_medium(limit: int, expected: Truncated | None) -> None:
    pieces = [QUESTION, Piece(IMAGE, 30, 5), ANSWER, Piece(VIDEO, 12, 2), ANSWER]
    assert truncated(pieces, limit, "cut") == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (150, Truncated(tokens=146, tiles=17, loss_tokens=20, kept=(5, 11, 1))),
        (
            140,
            Truncated(tokens=138, tiles=17, loss_tokens=20, kept=(5, 12, 0)),
        ),  # the last image goes first
        (
            137,
            Truncated(tokens=132, tiles=16, loss_tokens=20, kept=(5, 11, 0)),
        ),  # then frames of the video
        (72, Truncated(tokens=72, tiles=6, loss_tokens=20, kept=(5, 1, 0))),
        (71, Truncated(tokens=66, tiles=5, loss_tokens=20, kept=(5, 0, 0))),  # then all of it
        (36, Truncated(tokens=36, tiles=0, loss_tokens=20, kept=(0, 0, 0))),
        (35, None),  # the text alone is longer
    ],
)
def test_drop_media_keeps_all_text_and_media_from_the_first_on(
    limit: int, expected: Truncated | None
) -> None:
    pieces = [
        QUESTION,
        Piece(IMAGE, 30, 5),
        Piece(VIDEO, 72, 12),
        Piece(TEXT, 6),
        Piece(IMAGE, 8, 1),
        ANSWER,
    ]
    if limit == 150:  # a last video too long for the rest
        pieces = [
            QUESTION,
            Piece(IMAGE, 30, 5),
            Piece(VIDEO, 66, 11),
            ANSWER,
            Piece(TEXT, 6),
            Piece(VIDEO, 600, 100),
        ]
        expected = Truncated(tokens=150, tiles=19, loss_tokens=20, kept=(5, 11, 3))
    assert truncated(pieces, limit, "drop_media") == expected
