"""The four stages' data: answers are what pictures and films show, parts are apart, bytes repeat."""

import io
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.easy_vqa import prepare as easy_vqa_prepare
from examples.four_stages.drawing import COLORS, STAR, Shape
from examples.four_stages.films import (
    Length,
    clock,
    clock_questions,
    draw_scenes,
    make_clip_film,
    make_clock_film,
    make_needle_film,
    needle_pages,
)
from examples.four_stages.heldout import swap_media
from examples.four_stages.made import Made, make_all, record, write_set
from examples.four_stages.pictures import (
    CATEGORIZE,
    DESCRIBE,
    make_count,
    make_shape_caption,
    make_sheet,
    make_stamp,
    make_words,
    seeded,
    shape_captions,
    stamps,
)
from examples.four_stages.sets import FULL, MINIATURE, ByLength, Films, sample_set
from examples.four_stages.texts import PAGE, book_of, text_of, words_of
from megatron_vita.errors import DataError
from megatron_vita.evaluation.pages import PageStyle
from megatron_vita.text.conversation import check_messages
from tests.examples.four_stages_material import write_material

SMALL = Length(least=6, most=10, questions=4)


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)


def frames_of(film: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(film)) as archive:
        return [archive.read(member) for member in archive.infolist()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lines of each page that is drawn from now on."""
    seen: list[list[str]] = []
    draw = PageStyle.draw

    def note(style: PageStyle, lines: list[str]) -> bytes:
        seen.append(list(lines))
        return draw(style, lines)

    monkeypatch.setattr(PageStyle, "draw", note)
    return seen


def test_each_code_of_a_film_stands_on_one_page_with_its_name(drawn: list[list[str]]) -> None:
    made = make_needle_film("train", "video", SMALL, 3)
    shown = [" ".join(lines) for lines in drawn]
    (film,) = made.media
    assert 6 <= len(frames_of(film)) <= 10
    assert len(made.turns) == 4
    for question, code in made.turns:
        name = question.removeprefix("What is the access code of the ").partition("?")[0]
        assert [f"of the {name} is {code}." in page for page in shown].count(True) == 1
        assert sum(code in page for page in shown) == 1


def test_pages_without_a_code_are_those_of_the_book_in_order() -> None:
    draw = seeded("train", "test", 1)
    pages, turns = needle_pages("train", 8, questions=3, draw=draw)
    first = seeded("train", "test", 1)
    # The draws before the place of the film in the book: codes, names, pages.
    first.sample(range(10_000, 100_000), 3)
    first.sample(range(96), 3)
    first.sample(range(8), 3)
    start = first.randrange(len(book_of("train").lines))
    plain = [book_of("train").page(start + page, {}) for page in range(8)]
    assert sum(page != other for page, other in zip(pages, plain, strict=True)) == len(turns) == 3


def test_words_of_a_page_are_read_in_order(drawn: list[list[str]]) -> None:
    for index in range(20):
        made = make_words("held-out", index)
        assert made.turns[0][1].split() == " ".join(drawn[-1]).split()
        assert set(made.turns[0][1].split()) <= set(words_of("held-out"))


def test_answers_about_a_sheet_follow_from_its_lines(drawn: list[list[str]]) -> None:
    for index in range(20):
        made = make_sheet("train", index)
        lines = drawn[-1]
        words = " ".join(lines).split()
        for question, answer in made.turns:
            if question.startswith("What is the first word"):
                number = int(question.rstrip("?").rsplit(" ", 1)[1])
                assert lines[number - 1].startswith(answer)
            elif question.startswith("Which word comes after"):
                before = question.split('"', 1)[1].rsplit('"', 1)[0].split()
                after = [words[i + 2] for i in range(len(words) - 2) if words[i : i + 2] == before]
                assert after == [answer]
            else:
                assert answer == str(len(lines))


def components(image: np.ndarray, color: tuple[int, int, int]) -> int:
    """Connected areas of a color, by flood fill."""
    left = {tuple(place) for place in np.argwhere((image == color).all(-1))}
    found = 0
    while left:
        found += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
    return found


def test_counted_shapes_are_in_the_picture() -> None:
    for index in range(12):
        made = make_count("train", index)
        image = pixels(made.media[0])
        answers = dict(made.turns)
        total = int(answers.pop("How many shapes are there?"))
        by_color: dict[str, int] = {}
        for question, answer in answers.items():
            color = question.split()[2]
            by_color[color] = by_color.get(color, 0) + int(answer)
        for color, count in by_color.items():
            assert components(image, COLORS[color]) == count
        assert sum(by_color.values()) == total


def test_moments_of_a_film_are_what_its_frames_show() -> None:
    for index in range(5):
        made = make_clock_film("train", Length(least=12, most=24, questions=12), index)
        frames = [pixels(frame) for frame in frames_of(made.media[0])]
        colors = [middle_color(frame) for frame in frames]
        for question, answer in made.turns:
            if question.startswith("What is shown at"):
                at = question.removeprefix("What is shown at ").rstrip("?")
                assert colors[second_of(at)] == answer.split()[1]
            elif question.startswith("When is"):
                assert colors[second_of(answer)] == question.split()[3]


def middle_color(frame: np.ndarray) -> str:
    """Color in the middle of a shape, whatever its kind."""
    return next(name for name, value in COLORS.items() if tuple(frame[80, 66]) == value)


def second_of(shown: str) -> int:
    hours, minutes, seconds = map(int, shown.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def test_each_star_is_shown_for_one_second_and_clocks_are_distinct() -> None:
    for index in range(20):
        shown = draw_scenes(40 + index, seeded("train", "scenes", index))
        stars = [str(shape) for shape in shown if shape.name == STAR]
        assert len(set(stars)) == len(stars) == 6
        turns = dict(clock_questions(shown, most=99, draw=seeded("train", "turns", index)))
        assert turns["Which star is shown first?"] == f"a {stars[0]}"
        assert turns["Which star is shown last?"] == f"a {stars[-1]}"
    assert len({clock(second) for second in range(20_000)}) == 20_000
    assert clock(4000) == "1:06:40"


def test_a_film_of_clips_shows_both_in_the_order_of_the_answers(tmp_path: Path) -> None:
    clips = write_material(tmp_path) / "clips"
    made = make_clip_film(clips, "train", SMALL, 0)
    frames = frames_of(made.media[0])
    answers = dict(made.turns)
    # Clips of the test are of one color each.
    colors = {"a rabbit": (200, 0, 0), "bicycles": (0, 200, 0), "a man in a car": (0, 0, 200)}
    order = []
    for frame in frames:
        middle = pixels(frame)[64, 64]
        for name, color in colors.items():
            if np.abs(middle - color).max() < 40:
                order.append(name)
    assert (
        order
        == [answers["Which clip is shown first?"]] * 4 + [answers["Which clip is shown last?"]] * 4
    )


def test_stamps_have_caption_and_category_and_parts_share_none(tmp_path: Path) -> None:
    folder = write_material(tmp_path) / "stamps"
    train = stamps(folder, "train")
    held_out = stamps(folder, "held-out")
    assert {path for path, _ in train} & {path for path, _ in held_out} == set()
    assert len(train) + len(held_out) == 16
    for index, (path, words) in enumerate(held_out):
        turns = dict(make_stamp(folder, "held-out", index).turns)
        assert turns == {DESCRIBE: words, CATEGORIZE: path.relative_to(folder).parts[0]}


def test_training_text_captions_and_seeds_are_not_those_of_tests() -> None:
    train = set(text_of("train").split("\n\n"))
    assert not train & {text for text in text_of("held-out").split("\n\n") if len(text) > 80}
    for make in (make_count, make_words):
        assert make("train", 0) != make("held-out", 0)
    assert len(shape_captions("train")) > 3000
    _, words = shape_captions("held-out")[0]
    made = make_shape_caption("held-out", 0)
    assert made.turns == [(DESCRIBE, words)]
    color, shape = words.split()[1:]
    assert color in easy_vqa_prepare.COLORS
    assert shape in ("circle", "rectangle", "triangle")


def test_a_set_has_the_same_bytes_from_any_number_of_workers(tmp_path: Path) -> None:
    sets = {}
    for workers in (1, 2):
        made = sample_set("words", MINIATURE, material=tmp_path)
        folder = tmp_path / str(workers)
        write_set("words", count=9, maker=made.maker, folder=folder, workers=workers)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sets[workers] = {path.relative_to(folder): path.read_bytes() for path in files}
    assert sets[1] == sets[2]
    assert len(sets[1]) == 10


def test_results_of_processes_are_in_the_order_of_their_indexes() -> None:
    assert make_all(int, range(40), workers=2) == list(range(40))
    assert make_all(int, [3, 1], workers=2) == [3, 1]


def test_a_set_that_exists_is_kept_and_one_cut_short_is_made_again(tmp_path: Path) -> None:
    made = sample_set("words", MINIATURE, material=tmp_path)
    write = partial(write_set, "words", maker=made.maker, folder=tmp_path, workers=1)
    path = write(count=3)
    before = path.stat().st_mtime_ns
    assert write(count=99).stat().st_mtime_ns == before
    whole = path.read_bytes()
    path.unlink()
    (tmp_path / "media" / "words" / "0" / "0-0.png").write_bytes(b"cut")
    assert write(count=3).read_bytes() == whole
    assert pixels((tmp_path / "media" / "words" / "0" / "0-0.png").read_bytes()).shape[0] == 128


def test_films_of_several_lengths_follow_one_another() -> None:
    rows = (
        Films(length=SMALL, count=2),
        Films(length=Length(least=1, most=2, questions=1), count=3),
    )
    films = ByLength(rows, lambda length, index: Made(text=f"{length.most} {index}"))
    assert [films(index).text for index in range(5)] == ["10 0", "10 1", "2 2", "2 3", "2 4"]
    with pytest.raises(IndexError, match="film 5 of 5"):
        films(5)


def samples() -> Iterator[dict]:
    for index in range(6):
        made = make_needle_film("held-out", "image", SMALL, index)
        paths = [f"{index}-{number}.png" for number in range(len(made.media))]
        yield record(made, paths)


def test_swapped_samples_ask_the_same_about_media_of_another() -> None:
    rows = list(samples())
    swapped = swap_media(rows)
    for row, other in zip(rows, swapped, strict=True):
        assert not set(row["images"]) & set(other["images"])
        assert other["messages"][1:] == row["messages"][1:]
        question = row["messages"][0]["content"].replace("<image>", "")
        assert other["messages"][0]["content"].replace("<image>", "") == question
        check_messages(other)  # raises if tags and media differ in number
    assert sorted(json.dumps(row["images"]) for row in rows) == sorted(
        json.dumps(row["images"]) for row in swapped
    )


def test_a_kind_with_a_single_sample_has_no_control_and_is_refused() -> None:
    rows = list(samples())
    with pytest.raises(DataError, match="one sample of the kind 'codes, album'"):
        swap_media(rows[:1])
    # Several questions about the same pages are one sample, too.
    with pytest.raises(DataError, match="one sample"):
        swap_media([rows[0], rows[0]])
    odd = swap_media(rows[:3])
    assert all(row["images"] != other["images"] for row, other in zip(rows[:3], odd, strict=True))


def test_a_shape_names_itself() -> None:
    assert str(Shape("red", "circle")) == "red circle"


def test_the_longest_films_of_a_stage_fit_its_packs() -> None:
    limits = {"films": 131_072, "clocks": 131_072, "albums": 131_072, "clips": 131_072,
              "films_long": 524_288, "clocks_long": 524_288}  # fmt: skip
    for name, limit in limits.items():
        for row in getattr(FULL, name):
            # 64 tokens and two tags a frame; at most 34 tokens a question with its answer.
            tokens = 66 * (row.length.most + 8) + 34 * row.length.questions + 20
            assert tokens <= limit, name
    assert PAGE.columns == 14
