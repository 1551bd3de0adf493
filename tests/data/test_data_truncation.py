"""Truncation of documents that are longer than a pack."""

import pytest

from megatron_vita.data.samples.records import Kind
from megatron_vita.data.samples.truncation import Fit, Piece, fit, whole

TEXT, LOSS, IMAGE, VIDEO = Kind
QUESTION = Piece(TEXT, 10)
ANSWER = Piece(LOSS, 20)


def left_of(pieces: list[Piece], limit: int, policy: str) -> Fit | None:
    return fit(pieces, limit=limit, policy=policy, video_tokens=lambda frames: 6 * frames)


def test_all_of_a_document_is_counted() -> None:
    pieces = [QUESTION, Piece(IMAGE, 30, 5), ANSWER, Piece(VIDEO, 12, 2), ANSWER]
    assert whole(pieces) == Fit(tokens=92, tiles=7, rows=40, kept=(5, 2))
    assert whole([ANSWER, QUESTION]) == Fit(tokens=30, tiles=0, rows=19, kept=())


def test_reject_leaves_nothing() -> None:
    assert left_of([QUESTION, ANSWER], 29, "reject") is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (91, Fit(tokens=91, tiles=7, rows=39, kept=(5, 2))),
        (73, Fit(tokens=73, tiles=7, rows=21, kept=(5, 2))),
        # the video would be cut: it goes, and what follows
        (71, Fit(tokens=60, tiles=5, rows=20, kept=(5, 0))),
        (45, Fit(tokens=45, tiles=5, rows=5, kept=(5, 0))),
        (40, None),  # nothing is scored
        (39, None),
    ],
)
def test_cut_keeps_the_beginning_and_no_half_medium(limit: int, expected: Fit | None) -> None:
    pieces = [QUESTION, Piece(IMAGE, 30, 5), ANSWER, Piece(VIDEO, 12, 2), ANSWER]
    assert left_of(pieces, limit, "cut") == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (150, Fit(tokens=146, tiles=17, rows=20, kept=(5, 11, 1))),
        (140, Fit(tokens=138, tiles=17, rows=20, kept=(5, 12, 0))),  # the last image goes first
        (137, Fit(tokens=132, tiles=16, rows=20, kept=(5, 11, 0))),  # then frames of the video
        (72, Fit(tokens=72, tiles=6, rows=20, kept=(5, 1, 0))),
        (71, Fit(tokens=66, tiles=5, rows=20, kept=(5, 0, 0))),  # then all of it
        (36, Fit(tokens=36, tiles=0, rows=20, kept=(0, 0, 0))),
        (35, None),  # the text alone is longer
    ],
)
def test_drop_media_keeps_all_text_and_media_from_the_first_on(
    limit: int, expected: Fit | None
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
        expected = Fit(tokens=150, tiles=19, rows=20, kept=(5, 11, 3))
    assert left_of(pieces, limit, "drop_media") == expected
