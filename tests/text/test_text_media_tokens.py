"""The token sequences that stand for images and videos."""

import itertools

import pytest

from megatron_vita.text.media_tokens import (
    count_image_tokens,
    count_video_tokens,
    image_tokens,
    video_tokens,
)
from megatron_vita.text.tokenizer import Tokenizer


def named(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_an_untiled_image_is_its_thumbnail_alone(small_tokenizer: Tokenizer) -> None:
    tokens = image_tokens((1, 1), image_token_length=2, tokenizer=small_tokenizer)
    assert named(tokens.ids, small_tokenizer) == "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert tokens.offsets == [1]


def test_a_tiled_image_is_its_thumbnail_and_its_cells_with_a_newline_before_each_row(
    small_tokenizer: Tokenizer,
) -> None:
    tokens = image_tokens((2, 3), image_token_length=1, tokenizer=small_tokenizer)
    row = "\n" + "<patch><PATCH_CONTEXT></patch>" * 2
    assert named(tokens.ids, small_tokenizer) == "<img><IMG_CONTEXT></img>" + row * 3


def test_a_video_is_its_frames_without_anything_between(small_tokenizer: Tokenizer) -> None:
    tokens = video_tokens(3, image_token_length=2, tokenizer=small_tokenizer)
    assert named(tokens.ids, small_tokenizer) == "<vid><VID_CONTEXT><VID_CONTEXT></vid>" * 3
    assert tokens.offsets == [1, 5, 9]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (4, 3), (3, 4)])
def test_offsets_point_at_all_placeholders_in_the_order_of_the_tiles(
    small_tokenizer: Tokenizer, grid: tuple[int, int]
) -> None:
    tokens = image_tokens(grid, image_token_length=5, tokenizer=small_tokenizer)
    contexts = [small_tokenizer.special_id(name) for name in ("<IMG_CONTEXT>", "<PATCH_CONTEXT>")]
    places = [place for place, index in enumerate(tokens.ids) if index in contexts]
    assert places == [offset + step for offset in tokens.offsets for step in range(5)]
    cells = grid[0] * grid[1]
    assert len(tokens.offsets) == (cells + 1 if cells > 1 else 1)
    assert tokens.ids[tokens.offsets[0]] == contexts[0]
    assert all(tokens.ids[offset] == contexts[1] for offset in tokens.offsets[1:])


def test_counts_are_the_lengths_of_the_sequences(small_tokenizer: Tokenizer) -> None:
    newline_length = len(small_tokenizer.encode("\n"))
    for cols, rows in itertools.product(range(1, 5), repeat=2):
        tokens = image_tokens((cols, rows), image_token_length=3, tokenizer=small_tokenizer)
        count = count_image_tokens(
            (cols, rows), image_token_length=3, newline_length=newline_length
        )
        assert count == len(tokens.ids)
    for frames in (0, 1, 7):
        tokens = video_tokens(frames, image_token_length=3, tokenizer=small_tokenizer)
        assert count_video_tokens(frames, image_token_length=3) == len(tokens.ids)


@pytest.mark.parametrize(
    ("grid", "count"), [((1, 1), 258), ((4, 3), 3357), ((4, 2), 2324), ((3, 3), 2583)]
)
def test_counts_equal_those_of_the_reference(grid: tuple[int, int], count: int) -> None:
    assert count_image_tokens(grid, image_token_length=256, newline_length=1) == count


def test_a_newline_of_two_tokens_is_counted_as_two() -> None:
    assert count_image_tokens((2, 3), image_token_length=1, newline_length=2) == 3 + 3 * 2 + 6 * 3
