"""Pages: text set in a font, each page a square picture."""

import functools
import io
import pydoc_data.topics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megatron_vita.errors import ConfigError, DataError

LEADING = 1.25  # distance of lines in font sizes


@dataclass(frozen=True, kw_only=True)
class PageStyle:
    """How a page looks; lengths in pixels. `font` is a family that is installed, of even width, or
    a font file."""

    size: int = 448
    font: str = "DejaVu Sans Mono"
    font_size: int = 16

    @cached_property
    def face(self) -> ImageFont.FreeTypeFont:
        """The font. ConfigError if it cannot be found or read."""
        try:
            return ImageFont.truetype(
                self.font if Path(self.font).is_file() else _font_file(self.font), self.font_size
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"font {self.font!r}, size {self.font_size}: {error}") from error

    @property
    def margin(self) -> int:
        """Empty space at each edge."""
        return self.font_size

    @property
    def columns(self) -> int:
        """Characters of a line. ConfigError if the page is too small for words."""
        columns = int((self.size - 2 * self.margin) / self.face.getlength("m"))
        if columns < 20 or self.lines < 4:
            raise ConfigError(
                f"a page of {self.size} pixels with letters of {self.font_size} holds {self.lines} lines of {columns} "
                "characters: at least 4 of 20 are needed"
            )
        return columns

    @property
    def lines(self) -> int:
        """Lines of a page."""
        return int((self.size - 2 * self.margin) / (LEADING * self.font_size))

    def wrap(self, text: str) -> list[str]:
        """A text in lines of a page's width; paragraphs stay apart."""
        paragraphs = (paragraph.split() for paragraph in text.split("\n\n"))
        wrapped = (textwrap.wrap(" ".join(words), self.columns) for words in paragraphs if words)
        return [line for lines in wrapped for line in (*lines, "")]

    def draw(self, lines: Sequence[str]) -> bytes:
        """A page as PNG, dark grey on white. Lines beyond its foot are an error of ours."""
        assert len(lines) <= self.lines, "a page holds its lines"
        page = Image.new("L", (self.size, self.size), 255)
        pen = ImageDraw.Draw(page)
        for index, line in enumerate(lines):
            pen.text(
                (self.margin, self.margin + index * LEADING * self.font_size),
                line,
                fill=30,
                font=self.face,
            )
        file = io.BytesIO()
        page.save(file, "PNG")
        return file.getvalue()


class Book:
    """A text in pages without end: after its last line the first follows."""

    def __init__(self, text: str, *, style: PageStyle) -> None:
        self.style = style
        self.lines = style.wrap(text)
        if not any(self.lines):
            raise DataError("the haystack's text has no words")
        self._plain = functools.lru_cache(maxsize=8192)(self._draw)

    def page(self, number: int, replaced: Mapping[int, str]) -> bytes:
        """Page `number` as PNG, with some lines replaced: line of the page -> text."""
        if replaced:
            return self._draw(number, replaced)
        return self._plain(number)

    def _draw(self, number: int, replaced: Mapping[int, str] | None = None) -> bytes:
        first = number * self.style.lines
        texts = [
            self.lines[line % len(self.lines)] for line in range(first, first + self.style.lines)
        ]
        for line, text in (replaced or {}).items():
            texts[line] = text
        return self.style.draw(texts)


def read_text(paths: Iterable[str | Path]) -> str:
    """The haystack's text: these files, or where there are none, the reference of the Python
    language (0.5 MB)."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return "\n\n".join(texts or pydoc_data.topics.topics.values())


def _font_file(family: str) -> str:
    """Where an installed font is; matplotlib brings DejaVu. ValueError if there is none of this
    family."""
    from matplotlib import font_manager

    return font_manager.findfont(family, fallback_to_default=False)
