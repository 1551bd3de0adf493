"""Sets that stages train on and tests ask from: how many samples, and who makes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.four_stages.films import (
    Length,
    make_clip_film,
    make_clock_film,
    make_needle_film,
)
from examples.four_stages.made import Made, Maker
from examples.four_stages.pictures import (
    make_count,
    make_page,
    make_shape_caption,
    make_shape_question,
    make_sheet,
    make_stamp,
    make_words,
    shape_captions,
    shape_questions,
    stamps,
)
from examples.four_stages.texts import Part, text_of

TEXT_CHARACTERS = 4000  # of a sample of raw text

SHORT = Length(least=1, most=24, questions=6)
ALBUM = Length(least=1, most=12, questions=4)
MOMENTS = Length(least=4, most=24, questions=6)


@dataclass(frozen=True, kw_only=True)
class Films:
    """Films of one length, and their number."""

    length: Length
    count: int


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """Samples of each set; 0: all that the material has."""

    words: int
    pages: int
    stamp_copies: int  # of each stamp, at other places and sizes
    shapes: int  # captions and questions of easy-VQA
    sheets: int
    counts: int
    text: int
    short: int  # films, albums and clock films of stage 2, each
    films: Sequence[Films]
    albums: Sequence[Films]
    clocks: Sequence[Films]
    clips: Sequence[Films]
    films_long: Sequence[Films]
    clocks_long: Sequence[Films]


def _films(least: int, most: int, questions: int, *, count: int) -> Films:
    return Films(length=Length(least=least, most=most, questions=questions), count=count)


# A frame takes 66 tokens, a question up to 34: the longest films of a row end just below 8K, 32K,
# 64K and 128K tokens, of the last two rows below 256K and 512K.
FULL = Amounts(
    words=80_000,
    pages=40_000,
    stamp_copies=8,
    shapes=0,
    sheets=20_000,
    counts=20_000,
    text=0,
    short=20_000,
    films=(
        _films(50, 118, 12, count=200),
        _films(240, 470, 30, count=100),
        _films(500, 950, 45, count=30),
        _films(1200, 1930, 60, count=20),
    ),
    albums=(_films(50, 118, 12, count=40), _films(240, 460, 30, count=15)),
    clocks=(
        _films(50, 118, 12, count=60),
        _films(240, 470, 30, count=30),
        _films(1200, 1930, 60, count=8),
    ),
    clips=(_films(50, 110, 10, count=40), _films(240, 460, 20, count=16)),
    films_long=(_films(3500, 3900, 60, count=6), _films(7400, 7850, 60, count=2)),
    clocks_long=(_films(3500, 3900, 60, count=2),),
)
MINIATURE = Amounts(
    words=48,
    pages=16,
    stamp_copies=1,
    shapes=24,
    sheets=12,
    counts=16,
    text=8,
    short=12,
    films=(_films(2, 12, 4, count=6), _films(16, 24, 6, count=6)),
    albums=(_films(2, 8, 3, count=4),),
    clocks=(_films(8, 24, 4, count=4),),
    clips=(_films(4, 12, 4, count=4),),
    films_long=(_films(40, 48, 8, count=8),),
    clocks_long=(_films(32, 40, 6, count=2),),
)


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Number of samples and their maker."""

    count: int
    maker: Maker


@dataclass(frozen=True)
class ByLength:
    """Maker of films of several lengths, one length after another."""

    films: Sequence[Films]
    make: Callable[[Length, int], Made]

    def __call__(self, index: int) -> Made:
        """Make film number `index`."""
        before = 0
        for row in self.films:
            if index < before + row.count:
                return self.make(row.length, index)
            before += row.count
        raise IndexError(f"film {index} of {before}")

    @property
    def count(self) -> int:
        """Films of all lengths."""
        return sum(row.count for row in self.films)


def make_text(part: Part, index: int) -> Made:
    """A piece of raw text."""
    return Made(text=text_of(part)[index * TEXT_CHARACTERS : (index + 1) * TEXT_CHARACTERS])


def sample_set(name: str, amounts: Amounts, *, material: Path, part: Part = "train") -> SampleSet:
    """Return a set by its name.

    Raises:
        KeyError: there is no such set.
    """
    maker = _makers(amounts, material=material, part=part)[name]
    if isinstance(maker, ByLength):
        return SampleSet(count=maker.count, maker=maker)
    return SampleSet(count=_count(name, amounts, material=material, part=part), maker=maker)


def _makers(amounts: Amounts, *, material: Path, part: Part) -> dict[str, Maker]:
    needles = partial(make_needle_film, part, "video")
    clocks = partial(make_clock_film, part)
    clips = partial(make_clip_film, material / "clips", part)
    return {
        "words": partial(make_words, part),
        "pages": partial(make_page, part),
        "shape_captions": partial(make_shape_caption, part),
        "shape_questions": partial(make_shape_question, part),
        "stamps": partial(make_stamp, material / "stamps", part),
        "sheets": partial(make_sheet, part),
        "counts": partial(make_count, part),
        "films_short": partial(needles, SHORT),
        "albums_short": partial(make_needle_film, part, "image", ALBUM),
        "clocks_short": partial(clocks, MOMENTS),
        "text": partial(make_text, part),
        "films": ByLength(amounts.films, needles),
        "albums": ByLength(amounts.albums, partial(make_needle_film, part, "image")),
        "clocks": ByLength(amounts.clocks, clocks),
        "clips": ByLength(amounts.clips, clips),
        "films_long": ByLength(amounts.films_long, needles),
        "clocks_long": ByLength(amounts.clocks_long, clocks),
    }


def _count(name: str, amounts: Amounts, *, material: Path, part: Part) -> int:
    """Number of samples of a set that is not of films by length."""
    if name.endswith("_short"):
        return amounts.short
    if name == "shape_captions":
        return amounts.shapes or len(shape_captions(part))
    if name == "shape_questions":
        return amounts.shapes or len(shape_questions(part))
    if name == "stamps":
        return amounts.stamp_copies * len(stamps(material / "stamps", part))
    if name == "text":
        return amounts.text or len(text_of(part)) // TEXT_CHARACTERS
    return int(getattr(amounts, name))
