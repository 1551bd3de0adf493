"""Samples of single pictures: words to read, captions of shapes and stamps, questions, counts.

Every maker takes the part and the number of a sample, and always makes the same one.
"""

import itertools
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import Image

from examples.easy_vqa.prepare import (
    Question,
    caption,
    divide_training_split,
    image_path,
    read_questions,
)
from examples.four_stages.drawing import COLORS, SHAPES, Shape, draw_count, png
from examples.four_stages.made import Made, Turn
from examples.four_stages.texts import PAGE, SHEET, TILE, Part, full_lines, words_of

READ = "Read the page."
DESCRIBE = "Describe the picture."
CATEGORIZE = "Which category is it?"
STAMPS_HELD_OUT = 8  # every 8th stamp is for the tests
LEAST_PICTURE = 0.6  # side of a stamp in a tile, at least, as a share of the tile
FIRST_WORDS = 3  # questions of a page


def seeded(part: Part, name: str, index: int) -> Random:
    """Source of random numbers of one sample."""
    return Random(f"{part} {name} {index}")


def make_words(part: Part, index: int) -> Made:
    """One to six words in as many lines of a page, to be read."""
    draw = seeded(part, "words", index)
    words = draw.sample(words_of(part), draw.randint(1, PAGE.lines))
    places = sorted(draw.sample(range(PAGE.lines), len(words)))
    lines = [""] * PAGE.lines
    for place, word in zip(places, words, strict=True):
        lines[place] = " " * draw.randint(0, PAGE.columns - len(word)) + word
    return Made(turns=[(READ, " ".join(words))], media=[PAGE.draw(lines)], fields={"kind": "words"})


def make_page(part: Part, index: int) -> Made:
    """A page of real text in six lines, to be read."""
    draw = seeded(part, "page", index)
    lines = full_lines(part, PAGE)
    first = draw.randrange(len(lines) - PAGE.lines)
    shown = lines[first : first + PAGE.lines]
    return Made(turns=[(READ, " ".join(shown))], media=[PAGE.draw(shown)], fields={"kind": "page"})


def make_sheet(part: Part, index: int) -> Made:
    """A page of 2 x 2 tiles of real text, with questions of its content."""
    draw = seeded(part, "sheet", index)
    lines = full_lines(part, SHEET)
    first = draw.randrange(len(lines) - SHEET.lines)
    shown = lines[first : first + draw.randint(6, SHEET.lines)]
    turns = [_first_word(shown, draw) for _ in range(FIRST_WORDS)] + _next_words(shown, draw)
    turns.append(("How many lines does the page have?", str(len(shown))))
    draw.shuffle(turns)
    return Made(
        turns=list(dict(turns).items()), media=[SHEET.draw(shown)], fields={"kind": "document"}
    )


def _first_word(lines: tuple[str, ...], draw: Random) -> Turn:
    number = draw.randrange(len(lines))
    return f"What is the first word of line {number + 1}?", lines[number].split()[0]


def _next_words(lines: tuple[str, ...], draw: Random) -> list[Turn]:
    """Two questions for the word after two others, whose order is on the page once."""
    words = " ".join(lines).split()
    pairs = list(itertools.pairwise(words))[:-1]
    once = [index for index, pair in enumerate(pairs) if pairs.count(pair) == 1]
    chosen = draw.sample(once, min(2, len(once)))
    return [
        (f'Which word comes after "{" ".join(pairs[index])}"?', words[index + 2])
        for index in chosen
    ]


def make_count(part: Part, index: int) -> Made:
    """A picture of up to 12 shapes of two kinds, with questions for their numbers."""
    draw = seeded(part, "count", index)
    kinds = draw.sample([Shape(color, name) for color in COLORS for name in SHAPES], 2)
    numbers = [draw.randint(1, 6) for _ in kinds]
    shapes = [kind for kind, number in zip(kinds, numbers, strict=True) for _ in range(number)]
    draw.shuffle(shapes)
    turns = [
        (f"How many {kind}s are there?", str(number))
        for kind, number in zip(kinds, numbers, strict=True)
    ]
    turns.append(("How many shapes are there?", str(len(shapes))))
    draw.shuffle(turns)
    return Made(turns=turns, media=[draw_count(shapes, draw)], fields={"kind": "count"})


@lru_cache(maxsize=2)
def shape_questions(part: Part) -> tuple[Question, ...]:
    """easy-VQA's questions: the training split without its validation part, or the test split."""
    if part == "held-out":
        return tuple(read_questions("test"))
    return tuple(divide_training_split()[0])


@lru_cache(maxsize=2)
def shape_captions(part: Part) -> tuple[tuple[int, str], ...]:
    """(image, caption) of easy-VQA's images, such as "a red triangle", where questions tell it."""
    by_image: dict[int, list[Question]] = {}
    for question in shape_questions(part):
        by_image.setdefault(question.image, []).append(question)
    told = ((image, caption(questions)) for image, questions in by_image.items())
    return tuple((image, words) for image, words in told if words)


def make_shape_question(part: Part, index: int) -> Made:
    """One published question of easy-VQA."""
    question = shape_questions(part)[index]
    return Made(
        turns=[(question.text, question.answer)],
        media=[_shape_picture(part, question.image)],
        fields={"kind": "shapes"},
    )


def make_shape_caption(part: Part, index: int) -> Made:
    """The caption of an image of easy-VQA."""
    image, words = shape_captions(part)[index]
    return Made(
        turns=[(DESCRIBE, words)],
        media=[_shape_picture(part, image)],
        fields={"kind": "caption"},
    )


def _shape_picture(part: Part, image: int) -> bytes:
    split = "test" if part == "held-out" else "train"
    return image_path(split, image).read_bytes()


@lru_cache(maxsize=4)
def stamps(folder: Path, part: Part) -> tuple[tuple[Path, str], ...]:
    """(picture, English caption) of the stamps in a folder of categories, in order of their paths."""
    found = []
    for picture in sorted(folder.rglob("*.png")):
        text = picture.with_suffix(".txt")
        if text.exists():
            words = text.read_text(encoding="utf-8").partition("\n")[0].strip()
            found.append((picture, words))
    kept = [stamp for stamp in found if stamp[1]]
    is_held_out = part == "held-out"
    return tuple(
        stamp for number, stamp in enumerate(kept) if (number % STAMPS_HELD_OUT == 0) == is_held_out
    )


def make_stamp(folder: Path, part: Part, index: int) -> Made:
    """A stamp at a random place and size, with its caption and its category."""
    known = stamps(folder, part)
    picture, words = known[index % len(known)]
    draw = seeded(part, "stamp", index)
    turns = [(DESCRIBE, words), (CATEGORIZE, category(folder, picture))]
    draw.shuffle(turns)
    return Made(turns=turns, media=[_placed(picture, draw)], fields={"kind": "category"})


def category(folder: Path, picture: Path) -> str:
    """Category of a stamp: the topmost folder that it is in."""
    return picture.relative_to(folder).parts[0]


def _placed(picture: Path, draw: Random) -> bytes:
    """A picture on a white tile, at a random size and place, turned left to right half the time."""
    with Image.open(picture) as image:
        stamp = image.convert("RGBA")
    side = draw.randint(int(LEAST_PICTURE * TILE), TILE)
    stamp.thumbnail((side, side))
    if draw.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tile = Image.new("RGB", (TILE, TILE), "white")
    left = draw.randint(0, TILE - stamp.width)
    top = draw.randint(0, TILE - stamp.height)
    tile.paste(stamp, (left, top), stamp)
    return png(tile)
