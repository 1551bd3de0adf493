"""The token sequences that stand for images and videos."""

import itertools

import pytest

from megatron_vita.text.conversation import MediaPart, TextPart
from megatron_vita.text.media_tokens import MEDIA_FORMATS, InternVLFormat, LongVitaFormat
from megatron_vita.text.tokenizer_base import Tokenizer


def named(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_an_untiled_image_is_its_thumbnail_alone(small_tokenizer: Tokenizer) -> None:
    tokens = LongVitaFormat(small_tokenizer, image_token_length=2).image((1, 1))
    assert named(tokens.ids, small_tokenizer) == "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert tokens.offsets == [1]


def test_a_tiled_image_is_its_thumbnail_and_its_cells_with_a_newline_before_each_row(
    small_tokenizer: Tokenizer,
) -> None:
    tokens = LongVitaFormat(small_tokenizer, image_token_length=1).image((2, 3))
    row = "\n" + "<patch><PATCH_CONTEXT></patch>" * 2
    assert named(tokens.ids, small_tokenizer) == "<img><IMG_CONTEXT></img>" + row * 3


def test_a_video_is_its_frames_without_anything_between(small_tokenizer: Tokenizer) -> None:
    tokens = LongVitaFormat(small_tokenizer, image_token_length=2).video(3)
    assert named(tokens.ids, small_tokenizer) == "<vid><VID_CONTEXT><VID_CONTEXT></vid>" * 3
    assert tokens.offsets == [1, 5, 9]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (4, 3), (3, 4)])
def test_offsets_point_at_all_placeholders_in_the_order_of_the_tiles(
    small_tokenizer: Tokenizer, grid: tuple[int, int]
) -> None:
    tokens = LongVitaFormat(small_tokenizer, image_token_length=5).image(grid)
    contexts = [small_tokenizer.special_id(name) for name in ("<IMG_CONTEXT>", "<PATCH_CONTEXT>")]
    places = [place for place, index in enumerate(tokens.ids) if index in contexts]
    assert places == [offset + step for offset in tokens.offsets for step in range(5)]
    cells = grid[0] * grid[1]
    assert len(tokens.offsets) == (cells + 1 if cells > 1 else 1)
    assert tokens.ids[tokens.offsets[0]] == contexts[0]
    assert all(tokens.ids[offset] == contexts[1] for offset in tokens.offsets[1:])


@pytest.mark.parametrize("name", MEDIA_FORMATS)
def test_counts_are_the_lengths_of_the_sequences(small_tokenizer: Tokenizer, name: str) -> None:
    form = MEDIA_FORMATS[name](small_tokenizer, image_token_length=3)
    for grid in itertools.product(range(1, 5), range(1, 5)):
        assert form.image_length(grid) == len(form.image(grid).ids)
    for frames in (0, 1, 7, 10, 123):
        assert form.video_length(frames) == len(form.video(frames).ids)


@pytest.mark.parametrize(
    ("grid", "count"), [((1, 1), 258), ((4, 3), 3357), ((4, 2), 2324), ((3, 3), 2583)]
)
def test_counts_equal_those_of_the_reference(
    small_tokenizer: Tokenizer, grid: tuple[int, int], count: int
) -> None:
    assert len(small_tokenizer.encode("\n")) == 1
    assert LongVitaFormat(small_tokenizer, image_token_length=256).image_length(grid) == count


def test_a_newline_of_two_tokens_is_counted_as_two(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_tokenizer, "encode", lambda text: [7, 8])
    form = LongVitaFormat(small_tokenizer, image_token_length=1)
    assert form.image_length((2, 3)) == len(form.image((2, 3)).ids) == 3 + 3 * 2 + 6 * 3


def test_internvl_puts_one_tag_around_the_cells_and_the_thumbnail(
    small_tokenizer: Tokenizer,
) -> None:
    form = InternVLFormat(small_tokenizer, image_token_length=2)
    one = form.image((1, 1))
    three = form.image((3, 1))
    assert named(one.ids, small_tokenizer) == "<img>" + "<IMG_CONTEXT>" * 2 + "</img>"
    assert named(three.ids, small_tokenizer) == "<img>" + "<IMG_CONTEXT>" * 8 + "</img>"
    assert (one.offsets, three.offsets) == ([1], [1, 3, 5, 7])


def test_internvl_numbers_frames_from_one_on_lines_of_their_own(small_tokenizer: Tokenizer) -> None:
    form = InternVLFormat(small_tokenizer, image_token_length=1)
    tokens = form.video(11)
    frame = "<img><IMG_CONTEXT></img>"
    lines = "\n".join(f"Frame{number}: {frame}" for number in range(1, 12))
    assert form.video_opening + named(tokens.ids, small_tokenizer) == lines
    context = small_tokenizer.special_id("<IMG_CONTEXT>")
    assert [tokens.ids[offset] for offset in tokens.offsets] == [context] * 11


def test_a_list_of_parts_is_laid_out_as_each_format_parts_media_from_text() -> None:
    image = MediaPart("image")
    text = TextPart("what?")
    broken = TextPart("\nwhat?")
    line = TextPart("\n")
    assert LongVitaFormat.laid_out([image, image, text]) == [image, image, broken]
    assert LongVitaFormat.laid_out([text, image]) == [text, image]
    assert LongVitaFormat.laid_out([image, broken]) == [image, broken]
    assert InternVLFormat.laid_out([image, image, text]) == [image, line, image, line, text]
    assert InternVLFormat.laid_out([text, MediaPart("video")]) == [text, MediaPart("video"), line]
