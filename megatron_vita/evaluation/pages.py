"""Pages of text, drawn in a font as square pictures."""

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

LEADING = 1.25  # distance between lines, in font sizes
# Enough for the words of needles; a needle that takes more lines than a page has is refused by name.
LEAST_COLUMNS = 10
LEAST_LINES = 4


@dataclass(frozen=True, kw_only=True)
class PageStyle:
    """Appearance of a page; lengths in pixels.

    `font` is an installed family of fixed width, or a font file.
    """

    size: int = 448
    font: str = "DejaVu Sans Mono"
    font_size: int = 16

    @cached_property
    def face(self) -> ImageFont.FreeTypeFont:
        """The loaded font.

        Raises:
            ConfigError: it cannot be found or read.
        """
        try:
            file = self.font
            if not Path(file).is_file():
                file = _font_file(file)
            return ImageFont.truetype(file, self.font_size)
        except (OSError, ValueError) as error:
            raise ConfigError(f"font {self.font!r}, size {self.font_size}: {error}") from error

    @property
    def margin(self) -> int:
        """Empty space at each edge."""
        return self.font_size

    @property
    def columns(self) -> int:
        """Characters per line.

        Raises:
            ConfigError: the page is too small for words.
        """
        # Of one letter, since all have the same width: lines are wrapped by counting characters.
        columns = int((self.size - 2 * self.margin) / self.face.getlength("m"))
        if columns < LEAST_COLUMNS or self.lines < LEAST_LINES:
            raise ConfigError(
                f"a page of {self.size} pixels with letters of {self.font_size} holds "
                f"{self.lines} lines of {columns} characters: at least {LEAST_LINES} of "
                f"{LEAST_COLUMNS} are needed"
            )
        return columns

    @property
    def lines(self) -> int:
        """Lines per page."""
        return int((self.size - 2 * self.margin) / (LEADING * self.font_size))

    def wrap(self, text: str) -> list[str]:
        """Wrap a text to a page's width; paragraphs stay separate."""
        paragraphs = (paragraph.split() for paragraph in text.split("\n\n"))
        wrapped = (textwrap.wrap(" ".join(words), self.columns) for words in paragraphs if words)
        return [line for lines in wrapped for line in (*lines, "")]

    def draw(self, lines: Sequence[str]) -> bytes:
        """Draw a page as PNG, dark grey on white. There must be no more lines than fit."""
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
    """A text as an endless sequence of pages, starting over after its last line."""

    def __init__(self, text: str, *, style: PageStyle) -> None:
        self.style = style
        self.lines = style.wrap(text)
        if not any(self.lines):
            raise DataError("the haystack's text has no words")
        # Haystacks share all pages but those with needles. Drawing one takes milliseconds, and a
        # grid has many thousands.
        self._plain = functools.lru_cache(maxsize=8192)(self._draw)

    def page(self, number: int, replaced: Mapping[int, str]) -> bytes:
        """Return page `number` as PNG, with some lines replaced: line of the page -> text."""
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
    """Read the haystack's text: these files, or without any the Python language reference (0.5 MB).

    Raises:
        DataError: a file cannot be read as UTF-8.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return "\n\n".join(texts or pydoc_data.topics.topics.values())


def _font_file(family: str) -> str:
    """Return the file of an installed font; matplotlib brings DejaVu.

    Raises:
        ValueError: there is no font of this family.
    """
    from matplotlib import font_manager

    return font_manager.findfont(family, fallback_to_default=False)
