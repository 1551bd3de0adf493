"""Pictures that the example draws: words, scenes of shapes, frames with a clock."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from examples.four_stages.texts import TILE
from megatron_vita.evaluation.pages import PageStyle

COLORS = {
    "red": (220, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond")
STAR = "star"  # of moments alone: rare by what it is
CELL = TILE // 4
CLOCK = PageStyle(size=TILE, font_size=20)
INK = 30


@dataclass(frozen=True)
class Shape:
    """A filled shape of a color, both by their names."""

    color: str
    name: str

    def __str__(self) -> str:
        return f"{self.color} {self.name}"


def png(image: Image.Image) -> bytes:
    """Encode a picture; the same pixels give the same bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, *, left: int, top: int, side: int) -> None:
    """Draw a shape into a square of `side` pixels."""
    right = left + side
    bottom = top + side
    middle = (left + side / 2, top + side / 2)
    color = COLORS[shape.color]
    if shape.name == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif shape.name == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    elif shape.name == "triangle":
        pen.polygon([(left, bottom), (right, bottom), (middle[0], top)], fill=color)
    elif shape.name == "diamond":
        pen.polygon(
            [(middle[0], top), (right, middle[1]), (middle[0], bottom), (left, middle[1])],
            fill=color,
        )
    else:
        pen.polygon(_star(middle, side / 2), fill=color)


def _star(middle: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corners of a star of five points, the first one on top."""
    corners = []
    for index in range(10):
        length = radius if index % 2 == 0 else 0.4 * radius
        angle = math.pi * (index / 5 - 0.5)
        corners.append((middle[0] + length * math.cos(angle), middle[1] + length * math.sin(angle)))
    return corners


def draw_count(shapes: Sequence[Shape], draw: Random) -> bytes:
    """Draw at most 16 shapes of different sizes, each in a cell of its own."""
    image = Image.new("RGB", (TILE, TILE), "white")
    pen = ImageDraw.Draw(image)
    for cell, shape in zip(draw.sample(range(16), len(shapes)), shapes, strict=True):
        side = draw.randint(16, CELL - 6)
        left = (cell % 4) * CELL + draw.randint(2, CELL - side - 2)
        top = (cell // 4) * CELL + draw.randint(2, CELL - side - 2)
        draw_shape(pen, shape, left=left, top=top, side=side)
    return png(image)


def draw_clock_frame(clock: str, shape: Shape) -> bytes:
    """Draw a frame of a film: the time on top, a shape below."""
    image = Image.new("RGB", (TILE, TILE), "white")
    pen = ImageDraw.Draw(image)
    pen.text((20, 6), clock, fill=(INK, INK, INK), font=CLOCK.face)
    draw_shape(pen, shape, left=36, top=48, side=60)
    return png(image)
